"""What steers a tuning run, and the TrainingArguments that come of it. What cannot work is refused before hours of work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, TrainingArguments, default_data_collator, get_scheduler
from transformers.utils import is_liger_kernel_available

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


SAMPLING = ("random", "sequential", "group_by_length")
WSD = "warmup_stable_decay"
REFUSALS = ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ImportError  # of transformers, for what it is given
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
    except REFUSALS as error:
        raise _refused(error) from None


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
    _check_arguments(arguments(settings, Path("unused"), quiet=True), not settings.equal_rates)


def _refused(error: Exception) -> InputError:
    return InputError(f"tune: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def _check_arguments(args: TrainingArguments, measured: bool) -> None:
    """The rest by trying them on a model of one weight. measured: whether importances are."""
    if args.save_only_model:
        raise InputError("tune.save_only_model: a killed run could not go on with its rates and moments: leave it at false")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise InputError("tune.eval_strategy: held-out losses are logged every tune.eval_steps: leave it at no")
    if args.restore_callback_states_from_checkpoint:
        raise InputError("tune.restore_callback_states_from_checkpoint: a resumed run restores them itself: leave it at false")
    if args.ignore_data_skip:
        raise InputError("tune.ignore_data_skip: a resumed run would train again on what it began with: leave it at false")
    if args.train_sampling_strategy not in SAMPLING:
        raise InputError(f"tune.train_sampling_strategy must be one of {', '.join(SAMPLING)}, found {args.train_sampling_strategy!r}")
    if args.label_smoothing_factor >= 1:
        raise InputError(f"tune.label_smoothing_factor must be below 1, found {args.label_smoothing_factor}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("tune.use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it at false")
    options = args.gradient_checkpointing_kwargs or {}
    known = {"preserve_rng_state", *(name for name, entry in signature(checkpoint).parameters.items() if entry.kind is entry.KEYWORD_ONLY)}
    if args.gradient_checkpointing and not known.issuperset(options):
        raise InputError(f"tune.gradient_checkpointing_kwargs takes {', '.join(sorted(known))}, found {', '.join(options)}")
    if args.gradient_checkpointing and measured and options.get("use_reentrant"):
        raise InputError("tune.gradient_checkpointing_kwargs: importances need use_reentrant: false: leave it out")
    optimizer, options = StagedTrainer.get_optimizer_cls_and_kwargs(args)
    args.push_to_hub = False  # a Trainer would make the repository
    try:
        stepped = optimizer([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **options)
        get_scheduler(args.lr_scheduler_type, stepped, args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs)
        with TemporaryDirectory() as folder:
            args.output_dir = folder
            model = torch.nn.Linear(1, 1)
            model.config = PretrainedConfig()
            StagedTrainer(model, args, train_dataset=[{"labels": 0}], data_collator=default_data_collator).get_train_dataloader()
    except InputError:
        raise
    except REFUSALS as error:
        raise _refused(error) from None
