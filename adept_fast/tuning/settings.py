"""What steers a tuning run, and the TrainingArguments that come of it. What cannot work is refused before hours of work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from adept_fast.errors import InputError
from adept_fast.tuning.meter import ACTIONS
from adept_fast.tuning.rates import RateRule
from adept_fast.tuning.staged import StagedTrainer
from adept_fast.units import GRANULARITIES


@dataclass(frozen=True)
class TuningSettings:
    """What steers a run beside TrainingArguments (`training`: their names and values). equal_rates: every unit at the same rate."""

    units: str = "tensor"
    rate_map: str = "rank"
    rate_floor: float = 0.0
    rate_average: float = 0.0
    rate_conflict: bool = False
    equal_rates: bool = False
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
        if self.equal_rates:
            return RateRule(lambda importance, units: torch.ones_like(importance))
        return RateRule(self.rate_map, self.rate_floor, self.rate_average, self.rate_conflict)


WSD = "warmup_stable_decay"
DECAY_SHARE = 0.2  # of the steps, by 1 - sqrt: Haegele et al. (arXiv 2405.18392)


def arguments(settings: TuningSettings, folder: Path, quiet: bool, steps: int = 0) -> TrainingArguments:
    """TrainingArguments with defaults that suit: every step logged, a checkpoint at each refresh, the last one kept.

    steps: of the run, where they are planned; WSD ("wsd" for short) decays over the last fifth of them unless lr_scheduler_kwargs
    says otherwise.
    """
    training = dict(settings.training)
    if training.get("lr_scheduler_type") in ("wsd", WSD):
        decay = {"num_decay_steps": math.ceil(DECAY_SHARE * steps), "decay_type": "1-sqrt"}
        training |= {"lr_scheduler_type": WSD, "lr_scheduler_kwargs": {**decay, **(training.get("lr_scheduler_kwargs") or {})}}
    given = {
        "logging_steps": 1,
        "save_steps": settings.refresh_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": quiet,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        **training,
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
    for key in ("anchor_weight", "general_limit"):
        value = getattr(settings, key)
        if value is not None and not value >= 0:
            raise InputError(f"tune.{key} must be 0 or more, found {value}")
    args = arguments(settings, Path("unused"), quiet=True)
    if args.save_only_model:
        raise InputError("tune.save_only_model: a killed run could not go on with its rates and moments: leave it at false")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise InputError("tune.eval_strategy: held-out losses are logged every tune.eval_steps: leave it at no")
    if args.restore_callback_states_from_checkpoint:
        raise InputError("tune.restore_callback_states_from_checkpoint: a resumed run restores them itself: leave it at false")
    optimizer, options = StagedTrainer.get_optimizer_cls_and_kwargs(args)
    try:
        stepped = optimizer([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **options)
        get_scheduler(args.lr_scheduler_type, stepped, args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"tune: {error}") from None
