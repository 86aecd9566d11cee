"""Runs cases in children of a process that has imported everything, so that a signal, a hang or an exit is told apart from an answer and
laid at its case's door.

A case is FAMILY:SEED. Families are functions of a random.Random that return a Case, listed as FAMILIES by each file of families/.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tests.crash.case import Case

Family = Callable[[random.Random], Case]
FOLDER = Path(__file__).parent / "families"
# What a child would import otherwise, each anew; not everything is there on every machine.
IMPORTED = ("torch._dynamo", "adept_fast.kernels.adamw", "adept_fast.ops.adamw.cpu")


class Fault(NamedTuple):
    """A case that failed, and how."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}\n  alone: python -m tests.crash {self.name}"


def families() -> dict[str, Family]:
    """By name, of every file of families/."""
    found: dict[str, Family] = {}
    for path in sorted(FOLDER.glob("*.py")):
        for family in import_module(f"tests.crash.families.{path.stem}").FAMILIES:
            assert family.__name__ not in found, f"two families are named {family.__name__}"
            found[family.__name__] = family
    return found


def names(of: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` cases of the families in turn."""
    turn = list(of)
    return [f"{turn[i % len(turn)]}:{seed + i // len(turn)}" for i in range(count)]


def made(name: str, known: Mapping[str, Family]) -> Case:
    family, _, seed = name.partition(":")
    return known[family](random.Random(f"{family}:{seed}"))


def judged(name: str, known: Mapping[str, Family]) -> str:
    """What is wrong with the case `name`, in this process; empty where nothing is."""
    described = "making the case"
    try:
        case = made(name, known)
        described = case.described
        os.write(1, f"{described}\n".encode())  # what is known of a case that ends its process
        reason = case.fault()
    except Exception:
        reason = traceback.format_exc()
    return "" if reason is None else f"{described}\n  {reason}"


def run(cases: Sequence[str], known: Mapping[str, Family], seconds: float) -> list[Fault]:
    """The faults among `cases`, each of which may take `seconds`, in a child each: what one does to its memory harms no other. Nothing
    here may start threads of torch's, which a child does not inherit."""
    for module in IMPORTED:
        with suppress(ImportError):
            import_module(module)
    gc.collect()
    gc.freeze()  # children collect what they made, and leave the pages of what they inherit shared
    faults: list[Fault] = []
    for name in cases:
        with tempfile.TemporaryFile() as said:
            if reason := _answer(name, known, seconds, said):
                faults.append(Fault(name, reason))
    gc.unfreeze()
    return faults


def _answer(name: str, known: Mapping[str, Family], seconds: float, said: BinaryIO) -> str:
    """What is wrong with a case, by its child or by how that ended; "" for nothing."""
    reading, writing = Pipe(duplex=False)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _judge(name, known, seconds, said, writing)
    writing.close()
    hung = not reading.poll(seconds + 5)
    try:
        answer = "" if hung else reading.recv_bytes().decode()
    except EOFError:
        answer = None
    if hung:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0 and answer is not None:
        return answer
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    said.seek(0)
    text = said.read().decode(errors="replace").strip()
    return f"{'hung, ' if hung or 'Timeout (' in text else ''}{how}: {text[:3000]}"


def _judge(name: str, known: Mapping[str, Family], seconds: float, said: BinaryIO, writing: Connection) -> None:
    """In the child, which says what it says to `said`. It frees what it held, which is where a broken heap shows."""
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    faulthandler.enable(said)
    faulthandler.dump_traceback_later(seconds, exit=True, file=said)
    code = 1
    try:
        reason = judged(name, known)
        gc.collect()
        writing.send_bytes(reason.encode())
        code = 0
    finally:
        os._exit(code)
