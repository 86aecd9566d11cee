"""Run the tests of GPUs to the end, whatever one of them does: python -m tests.gpu FILE [options] [-- arguments of pytest].

An illegal access makes the GPU unusable for its process, and every later test there fails. So a process ends behind such a test, a crash or
a hang, and the next one goes on with the next test (tests/gpu/record.py). FILE is JSON: after every test `tests`, each with `outcome`,
`seconds` and `message`, and how many are `left`; at the end the machine, `counts` of outcomes, the `exits` of processes, and the end of
the `output` of those that did not exit with 0.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.__main__ import machine_facts

ROOT = Path(__file__).parents[2]
ENDS_WELL = (0, 5)  # 5: no test was left


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0, help="of all tests (default: %(default)g)")
    parser.add_argument("--each", type=float, default=120.0, help="seconds of a test at most (default: %(default)g)")
    parser.add_argument("--under", default="", help="a command that runs pytest, compute-sanitizer say")
    own, arguments = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    given = parser.parse_args(own)
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.unlink(missing_ok=True)
    found = run(given.file.resolve(), given.seconds, given.each, shlex.split(given.under), arguments)
    counts = Counter(test["outcome"] for test in found["tests"].values())
    given.file.write_text(json.dumps({"machine": machine_facts(), "counts": counts, **found}, indent=1) + "\n")
    for name, test in found["tests"].items():
        if test["outcome"] in ("failed", "unfinished"):
            print(f"{name}: {test['outcome']}: {test['message']}")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + f", {found['left']} not run")
    good = counts["passed"] and not (counts["failed"] or counts["unfinished"] or found["left"]) and not found["output"]
    return 0 if good else 1


def run(file: Path, seconds: float, each: float, under: list[str], arguments: list[str]) -> dict[str, Any]:
    """Start processes until no test is left, one has done nothing, or the time is over."""
    end = time.monotonic() + seconds
    pytest = ["-m", "pytest", "-q", "-rs", "--capture=sys", "-p", "tests.gpu.record", f"--record={file}", f"--each={each}"]
    found: dict[str, Any] = {"left": None, "tests": {}}
    exits, output = [], ""
    while found["left"] != 0 and time.monotonic() < end:
        done = len(found["tests"])
        try:
            process = subprocess.run(
                [*under, sys.executable, *pytest, *arguments], cwd=ROOT, timeout=end - time.monotonic(), text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said, code = process.stdout, process.returncode
        except subprocess.TimeoutExpired as stop:
            said, code = (stop.stdout or b"").decode(errors="replace"), None
        except OSError as error:
            said, code = str(error), None
        print(said, flush=True)
        exits.append(code)
        if code not in ENDS_WELL:
            output = (output + said)[-8000:]
        if file.exists():
            found = json.loads(file.read_text())
        if len(found["tests"]) == done:
            break
    return found | {"exits": exits, "output": output}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
