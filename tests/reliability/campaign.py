"""python -m tests.reliability.campaign [--kills N] [--faults N] [--seed S] [STAGE ...]: stages of a run disturbed at random moments.

A kill is SIGKILL, by the clock or at a random call that changes a file (half of a write is done); a fault is a disk that is full, that
fails once, or that is read-only, from a random such call on. After each nothing torn may stand under a final name, and the same command
must end in what an undisturbed run leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.reliability.disk_faults import Fault, failing, full, read_only
from tests.reliability.stages import NAMES, Stage, Stages

FAULTS = (full, failing, read_only)


def kill(stages: Stages, stage: Stage, draw: random.Random) -> tuple[bool, list[str]]:
    """Kill the stage once; whether it was alive, and what is wrong."""
    stages.begin(stage)
    command = draw.choice(stage.commands)
    if draw.random() < 0.5:
        moment, how = {"seconds": stage.seconds * draw.random()}, "kill by the clock"
    else:
        fault = Fault(str(stages.out), draw.randint(1, stage.calls))
        moment, how = fault.request(), str(fault)
    code, said = stages.run(command, **moment)
    return code == -9, _judged(stages, stage, how, [] if code in (0, -9) else [f"ended with {code}: {said}"])


def fail(stages: Stages, stage: Stage, draw: random.Random) -> tuple[bool, list[str]]:
    """Let the disk fail the stage once; whether it noticed, and what is wrong."""
    stages.begin(stage)
    fault = draw.choice(FAULTS)(str(stages.out), draw.randint(1, stage.calls))
    code, said = stages.run(draw.choice(stage.commands), **fault.request())
    wrong = []
    reasons = (os.strerror(fault.number), "could not be written")  # torch keeps no cause
    lines = [line for line in said.splitlines() if line.startswith("adept-fast: ")]
    if code not in (0, 1, 2) or "Traceback" in said:
        wrong.append(f"ended with {code}: {said}")
    elif code and not (len(lines) == 1 and str(stages.out) in lines[0] and any(f": {each}: " in lines[0] for each in reasons)):
        wrong.append(f"does not say what to do: {said}")
    return code != 0, _judged(stages, stage, str(fault), wrong)


def _judged(stages: Stages, stage: Stage, how: str, wrong: list[str]) -> list[str]:
    wrong += [f"torn: {name}" for name in stages.torn(stage)]
    after = stages.finish(stage)
    return [f"{stage.name}, {how}: {each}" for each in (*wrong, *([after] if after else []))]


def campaign(stages: Stages, names: list[str], kills: int, faults: int, seed: int) -> tuple[Counter[str], list[str]]:
    """What hit, by stage and kind, and what went wrong."""
    hits: Counter[str] = Counter()
    wrong: list[str] = []
    for name in names:
        for what, disturb, wanted in (("kills", kill, kills), ("faults", fail, faults)):
            draw = random.Random(f"{seed} {name} {what}")
            while hits[f"{name} {what}"] < wanted:
                hit, found = disturb(stages, stages.all[name], draw)
                hits[f"{name} {what}"] += hit
                wrong += found
                for line in found:
                    print(line, flush=True)
            print(f"{name}: {hits[f'{name} {what}']} {what}", flush=True)
    return hits, wrong


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.reliability.campaign", description=__doc__)
    options.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(NAMES)} (default: all)")
    options.add_argument("--kills", type=int, default=50, help="of each stage")
    options.add_argument("--faults", type=int, default=20, help="of each stage")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Stages(Path(folder)) as stages:
        hits, wrong = campaign(stages, given.stages or list(NAMES), given.kills, given.faults, given.seed)
    print(f"{len(wrong)} of {hits.total()} went wrong, in {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
