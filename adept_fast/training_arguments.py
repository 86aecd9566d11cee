"""transformers' TrainingArguments as keys under `tune`: their defaults here, and what they may be beyond what their types say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from adept_fast.declared import COUNT, Range, require
from adept_fast.errors import InputError
from adept_fast.overrides import number, numbers, unknown

DEFAULTS = {
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
}
WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "save_steps", "eval_steps", "save_total_limit")
NOT_NEGATIVE = ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "max_grad_norm", "dataloader_num_workers")
BOUNDS = {
    **dict.fromkeys((*NOT_NEGATIVE, "neftune_noise_alpha"), Range(0)),
    **dict.fromkeys(WHOLE, COUNT),
    **dict.fromkeys(("num_train_epochs", "logging_steps"), Range(0, above=True)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1, below=True)),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
SET_ELSEWHERE = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed", "resume_from_checkpoint": "output_dir"}
LEFT_OUT = {
    "eval_strategy": "held-out losses are logged every tune.eval_steps",
    "ignore_data_skip": "a resumed run would train again on what it began with",
    "optim_args": "unit-wise rates need adept_fast.AdamW, which takes tune.adam_beta1 and its like",
    "push_to_hub": "checkpoints hold the copies alone; publish output_dir/tuned when it is done",
    "restore_callback_states_from_checkpoint": "a resumed run restores them itself",
    "save_only_model": "a killed run could not go on with its rates and moments",
}
"""What would do harm, or nothing, and why: only the default is taken."""


@cache
def known() -> dict[str, tuple[Any, Any]]:
    """name -> (type hint, default)."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {entry.name: (hints[entry.name], entry.default) for entry in fields(TrainingArguments) if entry.init}


def checked(key: str, value: Any) -> Any:
    """The value of a TrainingArguments name under tune. Raises InputError naming the key and what it may be."""
    name = f"tune.{key}"
    if key in SET_ELSEWHERE:
        raise InputError(f"{name} is set by the recipe's {SET_ELSEWHERE[key]}")
    if key not in known():
        raise unknown(key, known(), "tune.")
    hint, default = known()[key]
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML 1.1 reads as false
    if key in LEFT_OUT and value != default:
        raise InputError(f"{name}: {LEFT_OUT[key]}: leave it out")
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    kind, bounds = kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else None, BOUNDS.get(key)
    if value is None and NoneType in get_args(hint):
        return None
    if kind in (int, float) and isinstance(value, str):
        value = number(value)
    if kind or bounds:
        require(name, value, int if bounds is COUNT else kind or str, bounds)
    return numbers(value) if isinstance(value, Mapping) else value
