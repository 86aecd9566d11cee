"""The settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from adept_fast.data.sources import Source
from adept_fast.settings.validation import COUNT, Range, declare


@dataclass(frozen=True)
class Eval:
    general: Source | None = declare(None, meaning="file with questions or texts; null: the part of the probe that only reports")
    domain: Source | None = declare(None, meaning="null: the held-out documents")
    max_items: int | None = declare(None, COUNT, "of each")
    general_limit: float | None = declare(
        None, Range(0), "nats per token that general loss may rise: eval then finds the largest strength alpha of the copies within it"
    )
