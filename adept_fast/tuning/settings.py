"""What steers a tuning run, and the TrainingArguments that come of it. What cannot work is refused before hours of work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, TrainingArguments, default_data_collator, get_scheduler
from transformers.utils import is_liger_kernel_available

from adept_fast.declared import check, declare
from adept_fast.errors import InputError
from adept_fast.keys import SEEDS, Tuning
from adept_fast.training_arguments import checked
from adept_fast.tuning.rates import RateRule
from adept_fast.tuning.staged import StagedTrainer


@dataclass(frozen=True)
class TuningSettings(Tuning):
    """What steers a run; `training`: TrainingArguments by name. equal_rates: every unit at the same rate. Raises InputError for values
    that are none of their key's."""

    equal_rates: bool = declare(False)
    seed: int = declare(0, SEEDS)

    def __post_init__(self) -> None:
        check(TuningSettings, "tune.", **vars(self))
        for name, value in self.training.items():
            checked(name, value)

    @property
    def rates(self) -> RateRule:
        if self.equal_rates:
            return RateRule(lambda importance, units: torch.ones_like(importance))
        return RateRule(self.rate_map, self.rate_floor, self.rate_average, self.rate_conflict)


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
    args = arguments(settings, Path("unused"), quiet=True)
    _check_arguments(args, not settings.equal_rates)
    if args.max_steps > 0:
        check_warmup(args, args.max_steps)


def check_warmup(args: TrainingArguments, steps: int) -> None:
    """Raise InputError for a warmup that a run of so many steps would not see the end of."""
    if args.warmup_steps > steps:
        raise InputError(f"tune.warmup_steps={args.warmup_steps:g} is more than the run's {steps:,} steps: give fewer, or a share below 1")


def _refused(error: Exception) -> InputError:
    return InputError(f"tune: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def _check_arguments(args: TrainingArguments, measured: bool) -> None:
    """The rest by trying them on a model of one weight. measured: whether importances are."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("tune.use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it at false")
    options = args.gradient_checkpointing_kwargs or {}
    known = {"preserve_rng_state", *(name for name, entry in signature(checkpoint).parameters.items() if entry.kind is entry.KEYWORD_ONLY)}
    if args.gradient_checkpointing and not known.issuperset(options):
        raise InputError(f"tune.gradient_checkpointing_kwargs takes {', '.join(sorted(known))}, found {', '.join(options)}")
    if args.gradient_checkpointing and measured and options.get("use_reentrant"):
        raise InputError("tune.gradient_checkpointing_kwargs: importances need use_reentrant: false: leave it out")
    optimizer, options = StagedTrainer.get_optimizer_cls_and_kwargs(args)
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
