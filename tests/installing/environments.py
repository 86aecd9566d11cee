"""Clean environments: a Python, the packages that are named, and nothing else; deleted at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "installing"


@dataclass(frozen=True)
class Environment:
    folder: Path

    def run(self, program: str, *arguments: object, cwd: Path = BUILD, bare: bool = False) -> str:
        """Run a program of the environment and return what it printed on stdout. bare: with no compiler, nor any other program, on PATH."""
        path = str(self.folder / "bin") + (os.pathsep + os.environ["PATH"]) * (not bare)
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUDA_HOME")} | {"PATH": path}
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{program} {' '.join(map(str, arguments))}: exit code {done.returncode}", done.stdout + done.stderr)
        return done.stdout

    def install(self, *packages: object) -> None:
        self.run("pip", "install", "--quiet", "--no-cache-dir", "--no-compile", *packages)


class Failed(Exception):
    """A program that failed: its command and all that it printed."""

    def __init__(self, command: str, printed: str) -> None:
        super().__init__(command)
        self.printed = printed


@contextmanager
def environment(python: str, *packages: object) -> Iterator[Environment]:
    BUILD.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=BUILD))
    try:
        subprocess.run([python, "-m", "venv", folder], check=True)
        made = Environment(folder)
        if packages:
            made.install(*packages)
        yield made
    finally:
        shutil.rmtree(folder)


def pythons() -> dict[str, str]:
    """Find the Pythons from 3.11 on PATH and of pyenv: {"3.12": executable}. The one that runs this stands for its own version."""
    found = {}
    for version in (f"3.{minor}" for minor in range(11, 20)):
        of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *of_pyenv):
            if candidate and subprocess.run([candidate, "-c", "import venv, ssl"], capture_output=True).returncode == 0:
                found[version] = str(candidate)
                break
    return found | {f"3.{sys.version_info.minor}": sys.executable}
