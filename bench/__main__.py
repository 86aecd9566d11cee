"""python -m bench NAME [--save] [options] runs main(argv) -> dict of bench/NAME.py and prints it as one JSON line, with machine facts.

--save also writes bench/results/NAME-DEVICE.json. NAME --help has the options. `all` runs every benchmark, each in a process of its own,
but for those that go on part by part or need a model or another checkout: builds, eight_bit, importance, pieces, race.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(argv: list[str]) -> dict" in path.read_text())
ASKED_FOR = ("builds", "eight_bit", "importance", "pieces", "race")


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def machine_facts() -> dict[str, str | int | None]:
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _help() -> str:
    lines = {name: ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())).split(": ")[0].split("\n\n")[0] for name in NAMES}
    return "\n".join([__doc__, *(f"  {name:22}{' '.join(line.split())}" for name, line in lines.items())])


def failures(result: Mapping[str, Any]) -> list[str]:
    """Return what a benchmark went on without: entries with `failed`, the reason."""
    found = []
    for key, entry in result.items():
        if isinstance(entry, Mapping):
            found += [f"{key}: {entry['failed']}"] if "failed" in entry else [f"{key}, {each}" for each in failures(entry)]
    return found


def run(name: str, argv: list[str], save: bool) -> int:
    result = import_module(f"bench.{name}").main(argv)
    line = json.dumps({"bench": name, "machine": machine_facts(), "result": result}, allow_nan=False)
    if save:
        device = re.sub(r"[^a-z0-9]+", "-", str(result.get("device", "cpu")).lower()).strip("-")
        target = FOLDER / "results" / f"{name}-{device}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(line + "\n")
    print(line)
    failed = failures(result)
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return int(bool(failed))


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in (*NAMES, "all"):
        asked = argv[:1] in (["-h"], ["--help"])
        print(_help(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, options = argv[0], argv[1:]
    if name == "all":
        names = [each for each in NAMES if each not in ASKED_FOR]
        codes = [subprocess.run([sys.executable, "-m", "bench", each, *options], cwd=FOLDER.parent).returncode for each in names]
        return max(codes, default=0, key=abs)
    return run(name, [option for option in options if option != "--save"], save="--save" in options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
