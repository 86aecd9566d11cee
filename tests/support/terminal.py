"""A pseudo-terminal for stdout and stderr of this process, and the screen that a user would see."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Terminal:
    """columns: its width. The buffer of the pseudo-terminal holds a few thousand characters until they are read."""

    def __init__(self, columns: int) -> None:
        self.columns, self.text = columns, ""
        self.leader, self.follower = pty.openpty()
        fcntl.ioctl(self.follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.leader, False)

    def screen(self) -> list[str]:
        """Return the lines on the screen so far, of which the cursor's is the last, without blanks at their ends."""
        try:
            while read := os.read(self.leader, 1 << 16):
                self.text += read.decode()
        except BlockingIOError:
            pass
        return screen(self.text, self.columns)


def screen(text: str, columns: int) -> list[str]:
    """Return the lines that a terminal shows after `text`: of what moves a cursor it knows carriage return, line feed and \\x1b[K."""
    lines, at, rest = [""], 0, text
    while rest:
        if rest.startswith("\x1b[K"):
            lines[-1], rest = lines[-1][:at], rest[3:]
            continue
        character, rest = rest[0], rest[1:]
        assert character != "\x1b", f"a sequence that this screen does not know: {rest[:8]!r}"
        if character == "\r":
            at = 0
        elif character == "\n":
            lines.append("")
            at = 0
        else:
            if at == columns:
                lines.append("")
                at = 0
            lines[-1] = lines[-1][:at].ljust(at) + character + lines[-1][at + 1 :]
            at += 1
    return [line.rstrip() for line in lines]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[Terminal]:
    """Connect stdout and stderr to a pseudo-terminal."""
    made = Terminal(columns)
    with os.fdopen(made.follower, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        patched.setattr(sys, "stderr", stream)
        yield made
    os.close(made.leader)
