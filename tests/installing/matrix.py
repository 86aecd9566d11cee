"""python -m tests.installing.matrix [3.N:TORCH:TRANSFORMERS ...]: the wheels of dist/ under many releases of torch and transformers.

Each combination is an environment of its own, with what [hf] brings today: the package is imported, the optimizer's tests run, then a
tiny model is scored, expanded, tuned and evaluated by the command line. Without arguments: the newest patch of every minor torch that
pyproject.toml allows, in turn with the oldest and the newest transformers, and every Python that has a wheel. The end is a table, and
build/installing/matrix.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from tests.installing.environments import BUILD, ROOT, Environment, Failed, environment, pythons
from tests.installing.wheels import DIST, STEP

TREE = BUILD / "tree"  # the tests without the package beside them, so that they find the installed one
OPTIMIZER = ("tests/optim", "tests/ops/test_adamw_reference.py", "tests/ops/test_adamw_cpu.py", "tests/ops/test_kernels_adamw.py")
PIPELINE = ("tests/pipeline/test_run.py::test_a_text_file_and_a_model_are_enough",)
TOOLS = ("triton", "pytest>=8", "hypothesis", "expecttest")


class Combination(NamedTuple):
    python: str
    torch: str
    transformers: str

    def result(self, executable: str, wheel: Path) -> dict[str, str]:
        """Install and test. Return the columns of the table. A step that fails has a log."""
        packages = [f"torch=={self.torch}", f"transformers=={self.transformers}", f"{wheel}[hf]", *TOOLS]
        steps: dict[str, Callable[[Environment], str | None]] = {
            "install": lambda made: made.install(*packages),
            "triton": lambda made: made.run("python", "-c", "from importlib.metadata import version as v; print(v('triton'))").strip(),
            "import": lambda made: made.run("python", "-c", STEP, bare=True) and None,
            "optimizer": lambda made: _tests(made, *OPTIMIZER),
            "pipeline": lambda made: _tests(made, *PIPELINE),
        }
        columns, start = self._asdict(), time.monotonic()
        with environment(executable) as made:
            for name, step in steps.items():
                try:
                    columns[name] = step(made) or "passed"
                except Failed as failed:
                    log = BUILD / f"{'-'.join((*self, name))}.log"
                    log.write_text(f"{failed.printed}\n{failed}\n", encoding="utf-8")
                    columns[name] = f"FAILED: {log.relative_to(ROOT)}"
        columns["seconds"] = f"{time.monotonic() - start:.0f}"
        print(" ".join(columns.values()), flush=True)
        return columns


def _tests(made: Environment, *files: str) -> str:
    arguments = ("-q", "-p", "no:cacheprovider", "-m", "not gpu and not nightly", *files)
    return made.run("python", "-m", "pytest", *arguments, cwd=TREE).splitlines()[-1].split(" in ")[0]


def releases(package: str) -> list[Version]:
    """Ask the registry for the releases that pyproject.toml allows, ascending."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["hf"]])
    allowed = next(each.specifier for each in required if each.name == package)
    with environment(sys.executable) as made:
        listed = made.run("pip", "index", "versions", package)
    return sorted(allowed.filter(map(Version, listed.partition("versions: ")[2].splitlines()[0].split(", "))))


def combinations(versions: list[str], tested: str) -> list[Combination]:
    """List them: every torch, in turn with the oldest and the newest transformers. tested: the torch to combine with other Pythons."""
    torches = {version.release[:2]: version.public for version in releases("torch")}
    oldest, *_, newest = map(str, releases("transformers"))
    own = f"3.{sys.version_info.minor}"
    return [
        *(Combination(own, torch, (oldest, newest)[index % 2]) for index, torch in enumerate(torches.values())),
        *(Combination(version, tested, newest) for version in versions if version != own),
    ]


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.installing.matrix", description=__doc__)
    options.add_argument("chosen", nargs="*", metavar="3.N:TORCH:TRANSFORMERS", help="combinations, such as 3.12:2.13.0:5.24.0")
    options.add_argument("--torch", default="torch==2.13.0", help="release to combine with each Python")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="combinations at a time, on one thread each (default: all cores)")
    given = options.parse_args()
    wheels = {f"3.{wheel.name.split('-cp3')[1].split('-')[0]}": wheel for wheel in sorted(DIST.glob("*.whl"))}
    found = pythons()
    chosen = [Combination(*text.split(":")) for text in given.chosen] or combinations(list(wheels), given.torch.partition("==")[2])
    shutil.rmtree(TREE, ignore_errors=True)
    shutil.copytree(ROOT / "tests", TREE / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", TREE)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = [*pool.map(lambda each: each.result(found[each.python], wheels[each.python]), chosen)]
    (BUILD / "matrix.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print()
    for line in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(line)} |")
    return int("FAILED" in str(rows))


if __name__ == "__main__":
    raise SystemExit(main())
