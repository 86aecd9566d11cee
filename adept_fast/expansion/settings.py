"""The settings of expansion: which layers are copied, and how a copy is initialised."""

from __future__ import annotations

from dataclasses import dataclass

from adept_fast.checkpoints.adept_config import PRESERVING
from adept_fast.scoring.settings import Selection
from adept_fast.settings.validation import declare


@dataclass(frozen=True)
class Expand(Selection):
    layers: tuple[int, ...] | None = declare(None, meaning="or exactly these: [3, 7]")
    initialisation: str = declare("zero_output", PRESERVING, "the last two, for research, change the logits")
