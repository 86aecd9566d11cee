"""python -m tests.fuzz --seed 0 --cases 1500: each case that ends otherwise than it may, with the command that runs it alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.fuzz.cases import fuzzer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    given = parser.parse_args()
    codes: Counter[int] = Counter()
    faults, started = 0, time.monotonic()
    with fuzzer(given.seed) as made:
        for number in given.only if given.only is not None else range(given.cases):
            verdict = made.run(number)
            codes[verdict.code] += 1
            if verdict.fault or given.only is not None:
                faults += bool(verdict.fault)
                print(f"{verdict.fault or 'right'}: {verdict.file}: {verdict.damage}")
                print(f"  adept-fast {verdict.command} -> {verdict.code}: {verdict.line[-600:]}")
                print(f"  {verdict.again(given.seed)}", flush=True)
    print(f"{sum(codes.values())} cases, {faults} faults, exits {dict(codes)}, {time.monotonic() - started:.0f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
