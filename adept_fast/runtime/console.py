"""What is said on stdout and stderr, neither of which a run depends on: a week of work does not end because nobody reads along."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def say(line: str, stream: TextIO) -> None:
    """Print a line at once. What the stream's encoding lacks is escaped; a stream that is closed or full is given up."""
    encoding = stream.encoding or "utf-8"
    with outliving(stream):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """Where a stream cannot be written to any more, what goes there from then on is lost; that is said, once, on stderr."""
    try:
        yield
    except OSError as error:
        _to_nowhere(stream)
        if stream is sys.stdout:
            say(f"adept-fast: stdout cannot be written to ({error.strerror}): going on without it", sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    with suppress(OSError):
        stream.flush()


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
