"""disk_faults.c, built once and preloaded into what forks attempts; in an attempt it is armed with what the request says."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
CREATE, WRITE, SYNC, RENAME, REMOVE = 1, 2, 4, 8, 16
EVERY = CREATE | WRITE | SYNC | RENAME | REMOVE


@dataclass(frozen=True)
class Fault:
    """The call `call` (from 1; 0: none, they are counted) among `kinds` beneath `folder` fails with errno `number` (0: it is the last, for
    its process is killed), and so do all later ones where `lasting`."""

    folder: str
    call: int = 0
    kinds: int = EVERY
    number: int = 0
    lasting: bool = False

    def request(self) -> dict[str, Any]:
        here = "tests.reliability.disk_faults"
        return {"fault": asdict(self), "before": f"{here}:arm", "after": f"{here}:disarm"}

    def __str__(self) -> str:
        how = "kill" if not self.number else errno.errorcode[self.number] + (" from" if self.lasting else "")
        return f"{how} at call {self.call}"


def full(folder: str, call: int) -> Fault:
    """A disk that is full from that call on; to delete works on."""
    return Fault(folder, call, EVERY & ~REMOVE, errno.ENOSPC, lasting=True)


def failing(folder: str, call: int) -> Fault:
    """A disk that fails once."""
    return Fault(folder, call, EVERY, errno.EIO)


def read_only(folder: str, call: int) -> Fault:
    """A file system that was mounted read-only, as the kernel does on an error."""
    return Fault(folder, call, EVERY, errno.EROFS, lasting=True)


def environment(folder: Path) -> dict[str, str]:
    """For what forks attempts: with the library, built in `folder`, preloaded."""
    library = folder / "disk_faults.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    root = str(Path(__file__).parents[2])
    return {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def arm(request: dict[str, Any]) -> None:
    fault = Fault(**request["fault"])
    call = ctypes.c_long(fault.call or -1)
    ctypes.CDLL(os.environ["LD_PRELOAD"]).disk_faults_arm(fault.folder.encode(), call, fault.kinds, fault.number, fault.lasting)


def disarm(request: dict[str, Any]) -> None:
    """Beside what was said, how many calls there were."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.disk_faults_counted.restype = ctypes.c_long
    calls = library.disk_faults_counted()
    library.disk_faults_arm(b"", ctypes.c_long(-1), 0, 0, 0)
    Path(request["output"] + ".calls").write_text(str(calls))
