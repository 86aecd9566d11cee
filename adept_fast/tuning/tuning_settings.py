"""Settings of a tuning run and its TrainingArguments. Settings that cannot work are refused before the work begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, TrainingArguments, default_data_collator, get_scheduler
from transformers.utils import is_liger_kernel_available

from adept_fast.errors import InputError
from adept_fast.settings.training_arguments import DEFAULTS, WSD, checked
from adept_fast.settings.validation import SEEDS, check, declare
from adept_fast.tuning.settings import Tuning
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.unit_rates import RateRule


@dataclass(frozen=True)
class TuningSettings(Tuning):
    """The settings of a run. `training` holds TrainingArguments by name. equal_rates: all units at rate 1. Raises InputError for a wrong
    value."""

    equal_rates: bool = declare(False)
    seed: int = declare(0, SEEDS)

    def __post_init__(self) -> None:
        check(TuningSettings, **vars(self))
        for name, value in self.training.items():
            checked(name, value)

    @property
    def rates(self) -> RateRule:
        if self.equal_rates:
            return RateRule(lambda importance, units: torch.ones_like(importance))
        return RateRule(self.rate_map, self.rate_floor, self.rate_average, self.rate_conflict)


REFUSALS = ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ImportError  # by transformers, for wrong arguments
DECAY_SHARE = 0.2  # of the steps; Haegele et al. (arXiv 2405.18392)


def arguments(settings: TuningSettings, folder: Path, steps: int = 0) -> TrainingArguments:
    """Build TrainingArguments, which by default log every step and write a checkpoint at each refresh, of which the last one stays.

    steps: of the run, where they are planned. WSD ("wsd" for short) decays over the last fifth of them by 1 - sqrt, unless
    lr_scheduler_kwargs says otherwise.
    """
    training = dict(settings.training)
    if training.get("lr_scheduler_type") in WSD:
        decay = {"num_decay_steps": math.ceil(DECAY_SHARE * steps), "decay_type": "1-sqrt"}
        training |= {"lr_scheduler_type": WSD[-1], "lr_scheduler_kwargs": {**decay, **(training.get("lr_scheduler_kwargs") or {})}}
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if training.get(key):
            training[key] = {"use_reentrant": False, **training[key]}  # torch's default would be True
    given = {
        "logging_steps": 1,
        "save_steps": settings.refresh_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        **training,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def check_settings(settings: TuningSettings) -> None:
    """Raise InputError for settings that training would refuse."""
    try:
        args = _try(settings)
    except InputError:
        raise
    except REFUSALS as error:
        causes = _keys_at_fault(settings, error)
        raise InputError(f"{', '.join(causes) or 'training'}: {_one_line(error)}", *(causes or ["training"])) from None
    if args.max_steps > 0:
        check_warmup(args, args.max_steps)
    if args.learning_rate * args.weight_decay > 1:
        found = f"learning_rate={args.learning_rate:g} times weight_decay={args.weight_decay:g}"
        why = "a step would take more than the whole of each weight away"
        raise InputError(f"{found} is above 1: {why}", "learning_rate", "weight_decay")


def check_meter(settings: TuningSettings, metering: Sequence[Any]) -> None:
    """Raise InputError where general loss is limited, and no items are held back to measure it on."""
    if settings.general_limit is not None and not metering:
        why = "the probe is too small to hold items back for it: give a probe of 20 items or more"
        raise InputError(f"general_limit: {why}", "general_limit")


def check_warmup(args: TrainingArguments, steps: int) -> None:
    """Raise InputError for a warmup longer than the run."""
    if args.warmup_steps > steps:
        found = f"warmup_steps={args.warmup_steps:g} is more than the run's {steps:,} steps"
        raise InputError(f"{found}: give fewer, or a share below 1", "warmup_steps")


def _keys_at_fault(settings: TuningSettings, error: Exception) -> list[str]:
    """Return the user's keys at fault: dropping one makes the rest valid or changes the error."""
    given = [name for name, value in settings.training.items() if name not in DEFAULTS or value != DEFAULTS[name]]
    errors = {name: _error_without(settings, name) for name in given}
    return [name for name in given if errors[name] is None] or [name for name in given if errors[name] != _one_line(error)]


def _error_without(settings: TuningSettings, key: str) -> str | None:
    try:
        _try(replace(settings, training={name: value for name, value in settings.training.items() if name != key}))
    except REFUSALS as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _try(settings: TuningSettings) -> TrainingArguments:
    """Build the TrainingArguments, and try optimizer, schedule and data loader on a model of one weight."""
    args = arguments(settings, Path("unused"))
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it at false", "use_liger_kernel")
    options: Any = args.gradient_checkpointing_kwargs or {}
    checkpoint(torch.relu, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options}).backward()
    if args.gradient_checkpointing and not settings.equal_rates and options.get("use_reentrant"):
        key = "gradient_checkpointing_kwargs"
        raise InputError(f"{key}: importances need use_reentrant: false: leave it out", key)
    optimizer, options = StagedTrainer.get_optimizer_cls_and_kwargs(args)
    stepped = optimizer([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **options)
    kwargs: Any = args.lr_scheduler_kwargs  # a string only until TrainingArguments has parsed it
    schedule = get_scheduler(args.lr_scheduler_type, stepped, args.get_warmup_steps(100), 100, kwargs)
    for _ in range(100):
        stepped.step()
        schedule.step()
    with TemporaryDirectory() as folder:
        args.output_dir = folder
        model: Any = torch.nn.Linear(1, 1)
        model.config = PretrainedConfig()
        StagedTrainer(model, args, train_dataset=[{"labels": 0}], data_collator=default_data_collator).get_train_dataloader()
    return args
