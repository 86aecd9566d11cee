"""The settings of expansion: which layers are copied, how a copy is initialised, and what may be done to copies."""

from __future__ import annotations

from dataclasses import dataclass

from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.scoring.settings import Selection
from adept_fast.settings.validation import Range, declare

MERGES = ("average", "stack")
ALPHA = Range(0)


@dataclass(frozen=True)
class Expand(Selection):
    layers: tuple[int, ...] | None = declare(None, meaning="or exactly these: [3, 7]")
    initialisation: str = declare("zero_output", PRESERVING, "the last two, for research, change the logits")
