"""Measure what each stage of a run takes, in the terms of a plan, so that the two can be compared."""

from __future__ import annotations

import time

from adept_fast.pipeline.planning.text import clock, shown
from adept_fast.runtime.memory import forget_peak, peak


class StageCosts:
    """Seconds and peak memory of stages, one after the other. The first begins with the process and includes its imports."""

    def __init__(self) -> None:
        self._start = time.perf_counter() - time.process_time()
        self.stages: dict[str, tuple[float, int]] = {}

    def end(self, stage: str) -> None:
        """End a stage; the next one begins. Device memory is left out."""
        now = time.perf_counter()
        self.stages[stage] = now - self._start, peak()
        self._start = now
        forget_peak()

    def __str__(self) -> str:
        parts = [f"{name} {clock(seconds)} and {shown(most)}" for name, (seconds, most) in self.stages.items()]
        seconds, most = sum(seconds for seconds, _ in self.stages.values()), max(most for _, most in self.stages.values())
        return f"took {clock(seconds)} and {shown(most)} of memory at most: {', '.join(parts)}"
