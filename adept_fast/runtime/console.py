"""What the command line shows of the logger "adept_fast": what a terminal or a pipe sees, and what of several processes.

Every module logs under its own name: news as INFO, what its reader should act on as WARNING. Nothing is attached at import, so a library
user's logging decides; `attached` is the command line's. A run does not depend on its streams: a week of work does not end because nobody
reads along.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

PACKAGE = "adept_fast"
PROGRESS = "adept_fast.runtime.progress"

logger = logging.getLogger(__name__)


class Console(logging.Handler):
    """Prints each message at once, as it is: progress to stderr, errors there too with the command's name, all else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            who = f"process {_rank()}: " if _rank() else ""
            _print(f"adept-fast: {who}{record.getMessage()}", sys.stderr)
        else:
            _print(record.getMessage(), sys.stderr if record.name == PROGRESS else sys.stdout)


def leading(record: logging.LogRecord) -> bool:
    """A handler's filter: of several processes, all report errors, and only the first one reports anything else."""
    return record.levelno >= logging.ERROR or not _rank()


@contextmanager
def attached() -> Iterator[None]:
    """Show what adept_fast logs, from INFO up, on stdout and stderr."""
    package, console = logging.getLogger(PACKAGE), Console()
    console.addFilter(leading)
    before = package.level, package.propagate
    package.addHandler(console)
    package.setLevel(logging.INFO)
    package.propagate = False  # a library that configures the root logger would show each line twice
    try:
        yield
    finally:
        package.removeHandler(console)
        package.setLevel(before[0])
        package.propagate = before[1]


@contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """Drop what goes to a stream that cannot be written to any more; that is said, once, on stderr."""
    try:
        yield
    except OSError as error:
        _to_nowhere(stream)
        if stream is sys.stdout:
            logger.error(f"stdout cannot be written to ({error.strerror}): going on without it")


def open_missing() -> None:
    """Give stdin, stdout and stderr that were closed at the start to nothing: else the next file that is opened would take their place,
    and what a library prints would end in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _print(line: str, stream: TextIO) -> None:
    """Print a line; what the stream's encoding lacks is escaped."""
    encoding = stream.encoding or "utf-8"
    with outliving(stream):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    with suppress(OSError):
        stream.flush()


def _rank() -> int:
    """This process's number, as its launcher says; torch need not be imported for it."""
    return int(os.environ.get("RANK", "0"))
