"""What steers a tuning run, and the TrainingArguments that come of it. What cannot work is refused before hours of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from adept_fast.errors import InputError
from adept_fast.tuning.meter import ACTIONS
from adept_fast.tuning.rates import RateRule
from adept_fast.tuning.trainer import AdeptTrainer
from adept_fast.units import GRANULARITIES


@dataclass(frozen=True)
class TuningSettings:
    """What steers a run beside TrainingArguments (`training`: their names and values)."""

    units: str = "tensor"
    rate_map: str = "rank"
    rate_floor: float = 0.0
    rate_average: float = 0.0
    rate_conflict: bool = False
    refresh_steps: int = 500
    block_size: int = 1024
    seed: int = 0
    anchor_weight: float | None = None
    anchor_every: int = 4
    anchor_tokens: int = 256
    general_limit: float | None = None
    general_action: str = "stop"
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rates(self) -> RateRule:
        return RateRule(self.rate_map, self.rate_floor, self.rate_average, self.rate_conflict)


def arguments(settings: TuningSettings, folder: Path, quiet: bool) -> TrainingArguments:
    """TrainingArguments with defaults that suit: every step logged, a checkpoint at each refresh, the last one kept."""
    given = {
        "logging_steps": 1,
        "save_steps": settings.refresh_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": quiet,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        **settings.training,
    }
    try:
        return TrainingArguments(output_dir=str(folder), **given)
    except (TypeError, ValueError) as error:
        raise InputError(f"tune: {str(error).splitlines()[0]}") from None


def check_settings(settings: TuningSettings) -> None:
    """Raise InputError for settings that tune_checkpoint would refuse, before hours of work."""
    for key, value, known in (("units", settings.units, GRANULARITIES), ("general_action", settings.general_action, ACTIONS)):
        if value not in known:
            raise InputError(f"tune.{key} must be one of {', '.join(known)}, found {value!r}")
    _ = settings.rates
    if settings.anchor_weight is not None and not settings.anchor_weight >= 0:
        raise InputError(f"tune.anchor_weight must be 0 or more, found {settings.anchor_weight}")
    args = arguments(settings, Path("unused"), quiet=True)
    if args.save_only_model:
        raise InputError("tune.save_only_model: a killed run could not go on with its rates and moments: leave it at false")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise InputError("tune.eval_strategy: held-out losses are logged every tune.refresh_steps: leave it at no")
    optimizer, options = AdeptTrainer.get_optimizer_cls_and_kwargs(args)
    try:
        optimizer([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **options)
    except ValueError as error:
        raise InputError(f"tune: {error}") from None
