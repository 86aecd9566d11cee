"""transformers' TrainingArguments as keys under `tune`: their defaults here, and what they may be beyond what their types say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from adept_fast.errors import InputError
from adept_fast.settings.key_value import unknown
from adept_fast.settings.validation import COUNT, Bounds, Range, options, require, shown
from adept_fast.settings.values import read

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULTS = {
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
}
WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "save_steps", "eval_steps", "save_total_limit")
MORE_WHOLE = ("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout")
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused")  # in whose place adept_fast.AdamW steps
WSD = ("wsd", "warmup_stable_decay")  # the short name is none of transformers'
LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"), Range(0)),
    **dict.fromkeys((*WHOLE, *MORE_WHOLE), COUNT),
    "num_train_epochs": Range(0, 1_000_000, above=True),
    "logging_steps": Range(0, above=True),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1, below=True)),
    **dict.fromkeys(("learning_rate", "adam_epsilon"), Range(0, 1)),  # AdamW moves each weight by about the rate in a step
    "neftune_noise_alpha": Range(0, 1000),  # 5 to 15 are in use
    "optim": PLAIN_ADAMW,
    "torch_compile_mode": ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "save_strategy": ("no", "steps", "epoch"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    **dict.fromkeys(("log_level", "log_level_replica"), LEVELS),
}
HINTS = {
    **dict.fromkeys(("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), dict[str, Any] | None),
    **dict.fromkeys(("fsdp", "trackio_static_space_id"), bool | str | None),
    "debug": str,
}
"""Where transformers takes other values than its own hints say, or no text can hold what they say."""
SET_ELSEWHERE = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed", "resume_from_checkpoint": "output_dir"}
NOT_EVALUATED = (
    *("eval_strategy", "eval_on_start", "eval_delay", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "do_eval", "do_predict"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval"),
)
HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision")
REFUSED = {
    "auto_find_batch_size": "out of memory, it would begin again with another batch than planned, in silence: "
    "set per_device_train_batch_size and gradient_accumulation_steps",
    "enable_jit_checkpoint": "it saves within a step, before rates and random numbers are those that a resumed run would have: "
    "save_steps says how often a killed run can go on",
    "use_cache": "packed documents are kept apart without a cache only",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation would cast all weights for good: load the model in that dtype"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "unit-wise rates need adept_fast.AdamW, with adam_beta1 and its like"),
    "parallelism_config": "several processes share the work by DDP or FSDP2, as accelerate launch is told",
}
"""What no trainer here can do right, and why: only the default is taken, from a recipe as from Python."""
LEFT_OUT = {
    **REFUSED,
    **dict.fromkeys(NOT_EVALUATED, "held-out losses are logged every eval_steps, and nothing else is evaluated"),
    **dict.fromkeys(HUB, "checkpoints hold the copies alone; publish output_dir/tuned when it is done"),
    "ignore_data_skip": "a resumed run would train again on what it began with",
    "restore_callback_states_from_checkpoint": "a resumed run restores them itself",
    "save_only_model": "a killed run could not go on with its rates and moments",
}
"""In a recipe: these too, which would do harm there, or nothing."""


def refuse(args: TrainingArguments, copies: bool = False) -> None:
    """Raise InputError for TrainingArguments that a trainer here could not obey. copies: whether it trains copies alone."""
    for name, why in REFUSED.items():
        if (value := getattr(args, name, None)) not in (None, known()[name][1] if name in known() else None):
            raise InputError(f"{name}={shown(value)}: {why}: leave it out", name)
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in PLAIN_ADAMW:
        raise InputError(f"optim={optim}: unit-wise rates need adept_fast.AdamW: leave optim at its default", "optim")
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
        raise InputError(
            f"push_to_hub: checkpoints hold what is trained alone, no whole model: give hub_strategy='end', and call push_to_hub() after "
            f"training, which publishes a whole one (found {shown(str(args.hub_strategy))})"
        )
    if getattr(args.accelerator_config, "split_batches", False):
        raise InputError(
            "accelerator_config.split_batches: per_device_train_batch_size is the batch of one process here: leave split_batches out"
        )
    if copies and is_reentrant(args):
        raise InputError(
            "gradient_checkpointing_kwargs: use_reentrant=True gives no gradient where a layer's input needs none, as that of the lowest "
            "copy: leave it out"
        )


def is_reentrant(args: TrainingArguments) -> bool:
    """Whether activations are to be checkpointed in torch's older way."""
    kwargs = args.activation_checkpointing_kwargs
    return bool(args.activation_checkpointing and isinstance(kwargs, Mapping) and kwargs.get("use_reentrant"))


@cache
def known() -> dict[str, tuple[Any, Any]]:
    """name -> (type hint, default)."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {entry.name: (HINTS.get(entry.name, hints[entry.name]), entry.default) for entry in fields(TrainingArguments) if entry.init}


def checked(key: str, value: Any) -> Any:
    """The value of a TrainingArguments name. Raises InputError naming it, and what it may be."""
    if key in SET_ELSEWHERE:
        raise InputError(f"{key} is set by the recipe's {SET_ELSEWHERE[key]}", key)
    if key not in known():
        raise unknown(key, known(), "")
    hint, default = known()[key]
    kind, optional = options(hint)
    named = next((each for each in get_args(kind) if isinstance(each, type) and issubclass(each, Enum)), ())
    bounds = BOUNDS.get(key) or tuple(each.value for each in named)
    value = read(value, str if bounds and not isinstance(bounds, Range) else hint)
    if key in LEFT_OUT and value != default:
        also = [name for name in known().keys() - SET_ELSEWHERE.keys() if re.search(rf"\b{name}\b", LEFT_OUT[key])]
        raise InputError(f"{key}: {LEFT_OUT[key]}: leave it out", key, *also)
    unset = type(value) is type(default) and value == default  # as max_steps=-1
    if (value is None and optional) or unset or (key == "lr_scheduler_type" and value in WSD):
        return value
    require(key, value, int if bounds is COUNT else kind if isinstance(bounds, Range) or not bounds else str, bounds or None)
    return value
