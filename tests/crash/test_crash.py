"""The crash harness: what it makes of cases that crash, hang or give wrong numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.crash import runner
from tests.crash.case import Case

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def killed(draw: random.Random) -> Case:
    return Case("a signal", lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hanging(draw: random.Random) -> Case:
    return Case("a hang", lambda: time.sleep(60))


def ended(draw: random.Random) -> Case:
    return Case("an exit", lambda: os._exit(3))


def infinite(draw: random.Random) -> Case:
    return Case("infinity", lambda: [torch.tensor([1.0, float("inf")])])


def wrong(draw: random.Random) -> Case:
    number = draw.random()
    return Case(f"{number}", lambda: [torch.tensor(number)], lambda: [torch.tensor(number + 0.001)])


def taken(draw: random.Random) -> Case:
    def refused() -> list[torch.Tensor]:
        raise ValueError("no")

    return Case("what the reference refuses", lambda: [torch.tensor(1.0)], refused)


def slipped(draw: random.Random) -> Case:
    return Case("a slip", lambda: None.shape)


def refused_though_valid(draw: random.Random) -> Case:
    return Case("valid input", lambda: torch.zeros(2) @ torch.zeros(3), valid=True)


def refused(draw: random.Random) -> Case:
    return Case("bad input", lambda: torch.zeros(2) @ torch.zeros(3))


CASES = 300  # make nightly runs 3,000


def right(draw: random.Random) -> Case:
    number = draw.random()
    return Case(f"{number}", lambda: [torch.tensor(number)], lambda: [torch.tensor(number)], valid=True)


@pytest.mark.nightly
def test_a_signal_a_hang_and_wrong_numbers_are_laid_at_their_case() -> None:
    found = {
        killed: "killed by SIGSEGV: a signal\nFatal Python error: Segmentation fault",
        hanging: "hung, the process ended with 1: a hang\nTimeout (",
        ended: "the process ended with 3: an exit",
        infinite: "result 0 of finite input is not finite",
        wrong: "result 0 is wrong",
        taken: "taken, where the reference refuses: ValueError: no",
        slipped: "AttributeError: 'NoneType' object has no attribute 'shape'",
        refused_though_valid: "valid input was refused: RuntimeError",
    }
    known = {family.__name__: family for family in (*found, refused, right)}
    faults = {fault.name: str(fault) for fault in runner.run(runner.names(known, 20, seed=4), known, seconds=3)}
    assert faults.keys() == {f"{family.__name__}:{seed}" for family in found for seed in (4, 5)}
    for family, reason in found.items():
        assert reason in faults[f"{family.__name__}:5"]
    assert f"{random.Random('wrong:5').random()}" in faults["wrong:5"]
    assert "python -m tests.crash wrong:5" in faults["wrong:5"]


def test_cases_give_right_numbers_or_a_python_exception() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.crash", "--count", str(CASES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
