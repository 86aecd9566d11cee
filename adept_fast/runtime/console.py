"""The command line's handler of the logger "adept_fast": which messages go to stdout and stderr, and from which process.

Every module logs under its own name: progress of the work as INFO, faults that the user should act on as WARNING. No handler is installed
at import, so that users of the library configure logging themselves. A run goes on when stdout or stderr cannot be written to any more.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

PACKAGE = "adept_fast"
PROGRESS = "adept_fast.runtime.progress"

logger = logging.getLogger(__name__)


class Bar(Protocol):
    """A progress bar on a terminal's line or in a notebook."""

    def hide(self) -> None: ...

    def show(self) -> None: ...


LAST = {"last": True}
"""`extra` of the message with which a command ends. A reader who stops in the middle of it, as head does, misses nothing else."""
bars: list[Bar] = []
"""The open bars, the innermost last. A message is printed in place of the bar, which then follows it."""


class Console(logging.Handler):
    """Prints messages without buffering: progress and errors to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            who = f"process {_rank()}: " if _rank() else ""
            _print(f"adept-fast: {who}{record.getMessage()}", sys.stderr)
        else:
            _print(record.getMessage(), sys.stderr if record.name == PROGRESS else sys.stdout, "last" in vars(record))


def leading(record: logging.LogRecord) -> bool:
    """Filter of the handler: pass errors of every process, and all other messages of the first one only."""
    return record.levelno >= logging.ERROR or not _rank()


@contextmanager
def attached() -> Iterator[None]:
    """Show messages of adept_fast from INFO up on stdout and stderr."""
    package, console = logging.getLogger(PACKAGE), Console()
    console.addFilter(leading)
    before = package.level, package.propagate
    package.addHandler(console)
    package.setLevel(logging.INFO)
    package.propagate = False  # else a root logger that a library has configured prints every line again
    try:
        yield
    finally:
        package.removeHandler(console)
        package.setLevel(before[0])
        package.propagate = before[1]


@contextmanager
def outliving(stream: TextIO, last: bool = False) -> Iterator[None]:
    """Redirect a stream to /dev/null when it cannot be written to any more. For stdout, log that once. last: see LAST."""
    try:
        yield
    except OSError as error:
        _to_nowhere(stream)
        if stream is sys.stdout and not (last and isinstance(error, BrokenPipeError)):
            logger.error(f"stdout cannot be written to ({error.strerror}): going on without it")


def replace_line(text: str) -> None:
    """Erase the line of a terminal on stderr, and write `text` there."""
    with outliving(sys.stderr):
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def open_missing() -> None:
    """Open /dev/null for stdin, stdout and stderr that are closed at the start.

    Otherwise the next opened file would get their descriptor, and output of libraries would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _print(line: str, stream: TextIO, last: bool = False) -> None:
    """Print a line. Characters that the stream's encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    with outliving(stream, last):
        for bar in bars[-1:]:
            bar.hide()
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
        for bar in bars[-1:]:
            bar.show()


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    with suppress(OSError):
        stream.flush()


def _rank() -> int:
    """Return the rank that the launcher has set, without importing torch."""
    return int(os.environ.get("RANK", "0"))
