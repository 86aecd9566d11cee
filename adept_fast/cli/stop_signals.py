"""Stop a run on SIGTERM and SIGHUP as on Ctrl-C: schedulers and terminals send them, and nothing must be left half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised by a signal. number: the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise Stopped(number)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread on either signal. An ignored signal (by nohup, say) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, _stop)
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
