"""The settings of tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.settings.training_arguments import DEFAULTS, checked, known
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
        0.0, Range(0, 1, below=True), "share of the earlier refreshes in a moving average of the normalised importances"
    )
    rate_conflict: bool = declare(False, meaning="slow units whose momentum opposes the probe's gradient, by 1 - max(0, -cos)")
    refresh_steps: int = declare(500, COUNT, "unit rates are measured again, held-out losses logged, a checkpoint written")
    block_size: int = declare(1024, Range(2), "tokens of a packed block")
    skip_nonfinite: int = declare(0, Range(0), "so many steps of a loss or gradient that is not finite are skipped; one more stops the run")
    anchor_weight: float | None = declare(
        None, Range(0, 1000), "0.5: hold the model to its base without replay data, by that weight of KL(base || model), ..."
    )
    anchor_every: int = declare(4, COUNT, "... in the loss of every fourth step, ...")
    anchor_tokens: int = declare(256, COUNT, "... on so many tokens of the probe items that steer unit rates")
    general_limit: float | None = declare(
        None, Range(0), "0.05: once general loss on probe items held back for it has risen by so many nats per token, ..."
    )
    general_action: str = declare("stop", ACTIONS, "... stop there, or halve all rates at each refresh that finds it above")
    extend: bool = declare(
        False, meaning="go on with another number of steps where the schedule would have given the steps that are done other rates"
    )
    training: Mapping[str, Any] = field(
        default_factory=DEFAULTS.copy,
        metadata={"known": known, "checked": checked, "meaning": "these five and any other name of transformers' TrainingArguments"},
    )
