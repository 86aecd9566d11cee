"""python -m tests.crash [--count N] [--seed S] [--seconds T] [FAMILY | FAMILY:SEED ...]: cases that must end in right numbers or a Python
exception. Cases given by name run in this process, one after the other, and show where it crashes; families are drawn from in children."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from tests.crash import runner


def main(argv: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    options.add_argument("chosen", nargs="*", metavar="FAMILY[:SEED]", help="families (default: all), or cases to run alone")
    options.add_argument("--count", type=int, default=300, help="of cases, of the families in turn")
    options.add_argument("--seed", type=int, default=0, help="of the first case of each family")
    options.add_argument("--seconds", type=float, default=20.0, help="that a case may take")
    given = options.parse_args(argv)
    torch.set_num_threads(1)
    known = runner.families()
    if any(name.partition(":")[0] not in known for name in given.chosen):
        options.error(f"the families are {', '.join(known)}")
    alone = [name for name in given.chosen if ":" in name]
    if alone:
        faulthandler.enable()
        faults = [runner.Fault(name, reason) for name in alone if (reason := runner.judged(name, known))]
        cases = alone
    else:
        cases = runner.names(given.chosen or known, given.count, given.seed)
        start = time.monotonic()
        faults = runner.run(cases, known, given.seconds)
        print(f"{len(cases)} cases of {len(given.chosen or known)} families in {time.monotonic() - start:.0f} s")
    for fault in faults:
        print(fault)
    print(f"{len(faults)} of {len(cases)} cases failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
