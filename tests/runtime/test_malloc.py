"""Memory goes back to the system."""

from __future__ import annotations

import gc

from adept_fast.runtime.malloc import garbage_returned
from adept_fast.runtime.memory import resident


class Ring:
    def __init__(self, size: int) -> None:
        self.ring, self.blocks = self, [b"x" * 2**16 for _ in range(size // 2**16)]  # of the heap, not mapped each by itself


def test_what_refers_only_to_itself_is_returned() -> None:
    gc.disable()
    try:
        Ring(2**27)
        held = resident()
        garbage_returned()
        assert held - resident() > 0.9 * 2**27
    finally:
        gc.enable()
