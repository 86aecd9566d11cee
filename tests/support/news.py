"""What adept_fast logs while a test looks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard() -> Iterator[list[str]]:
    """The messages from INFO up, in a list that grows."""
    messages: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    package, handler = logging.getLogger("adept_fast"), Listening()
    before = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
