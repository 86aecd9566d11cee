"""The settings of tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.settings.training_arguments import COMMON, DEFAULTS, SET_ELSEWHERE, checked, known
from adept_fast.settings.validation import COUNT, Range, declare

RATE_MAPS = ("rank", "mean_preserving", "paper")
ACTIONS = ("stop", "cut")


@dataclass(frozen=True)
class Tuning:
    """The keys of `tune` that do not depend on where the data comes from."""

    units: str = declare("tensor", GRANULARITIES, "what has a learning rate of its own")
    rate_map: str = declare("rank", RATE_MAPS, "from importances to rates")
    rate_floor: float = declare(0.0, Range(0, 1), "the lowest multiplier; the gate of a post-norm copy has 1 at least")
    rate_average: float = declare(
        0.0, Range(0, 1, below=True), "weight of earlier refreshes in the moving average of normalised importances"
    )
    rate_conflict: bool = declare(False, meaning="slow units whose momentum opposes the probe's gradient, by 1 - max(0, -cos)")
    refresh_steps: int = declare(500, COUNT, "steps between two refreshes of the rates, held-out losses and checkpoints")
    block_size: int = declare(1024, Range(2), "tokens of a packed block")
    skip_nonfinite: int = declare(0, Range(0), "steps with a loss or gradient that is not finite to skip; one more stops the run")
    anchor_weight: float | None = declare(
        None, Range(0, 1000), "0.5: weight of KL(base || model) in the loss, which holds the model to its base without replay data"
    )
    anchor_every: int = declare(4, COUNT, "optimizer steps between two steps with that loss")
    anchor_tokens: int = declare(256, COUNT, "tokens of such a step, from the probe items that set the unit rates")
    general_limit: float | None = declare(
        None, Range(0), "0.05: nats per token that general loss on held-back probe items may rise before general_action"
    )
    general_action: str = declare("stop", ACTIONS, "stop training, or cut all rates by half at each refresh above the limit")
    extend: bool = declare(False, meaning="allow another number of steps even if it changes the learning rates of finished steps")
    training: Mapping[str, Any] = field(
        default_factory=DEFAULTS.copy,
        metadata={"known": known, "checked": checked, "common": COMMON, "elsewhere": SET_ELSEWHERE},
    )
