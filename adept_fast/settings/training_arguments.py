"""transformers' TrainingArguments as keys under `tune`: defaults, bounds, and the ones that are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from adept_fast.errors import InputError
from adept_fast.settings.key_value import unknown
from adept_fast.settings.validation import COUNT, Bounds, Range, declare, options, require, shown
from adept_fast.settings.values import read

if TYPE_CHECKING:
    from transformers import TrainingArguments

WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "save_steps", "eval_steps", "save_total_limit")
MORE_WHOLE = ("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout")
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused")  # adept_fast.AdamW replaces these
WSD = ("wsd", "warmup_stable_decay")  # transformers does not know the short name
LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
BOUNDS: Mapping[str, Bounds] = {
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"), Range(0)),
    **dict.fromkeys((*WHOLE, *MORE_WHOLE), COUNT),
    "num_train_epochs": Range(0, 1_000_000, above=True),
    "logging_steps": Range(0, above=True),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1, below=True)),
    **dict.fromkeys(("learning_rate", "adam_epsilon"), Range(0, 1)),  # AdamW changes a weight by about the learning rate per step
    "neftune_noise_alpha": Range(0, 1000),  # 5 to 15 are common
    "optim": PLAIN_ADAMW,
    "torch_compile_mode": ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "save_strategy": ("no", "steps", "epoch"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    **dict.fromkeys(("log_level", "log_level_replica"), LEVELS),
}
COMMON = {
    name: declare(default, BOUNDS.get(name), meaning)
    for name, (default, meaning) in {
        "learning_rate": (2.0e-4, "of a unit with multiplier 1, at the top of the schedule"),
        "num_train_epochs": (1, "passes over the training blocks"),
        "warmup_steps": (0.03, "of the learning rate: a share of all steps if below 1, else a number of steps"),
        "lr_scheduler_type": ("cosine", "or linear, constant, constant_with_warmup, wsd and the others of transformers"),
        "per_device_train_batch_size": (4, "blocks a process takes at a time"),
        "gradient_accumulation_steps": (1, "batches of a step"),
        "max_steps": (-1, "stop after so many steps; -1: after num_train_epochs"),
        "weight_decay": (0.0, "of AdamW, decoupled"),
        "adam_beta1": (0.9, "decay of the first moment"),
        "adam_beta2": (0.999, "decay of the second moment"),
        "adam_epsilon": (1e-8, "added to the root of the second moment"),
        "max_grad_norm": (1.0, "clip the gradient to this norm; 0: never"),
        "bf16": (False, "compute in bfloat16 by autocast; weights and optimizer keep their dtype"),
        "gradient_checkpointing": (None, "compute activations again in the backward pass, to save memory"),
        "eval_steps": (None, "steps between two measurements of held-out losses; null: refresh_steps"),
        "save_steps": (500, "steps between two checkpoints; refresh_steps unless given"),
        "logging_steps": (1, "steps between two lines of the log"),
        "report_to": ("none", "tensorboard, wandb and the other trackers of transformers"),
        "dataloader_num_workers": (0, "processes that prepare batches"),
        "use_cpu": (False, "train on the CPU even if there is a GPU"),
    }.items()
}
"""The most used arguments, with the defaults that they have here."""
DEFAULTS = {name: COMMON[name].default for name in [*COMMON][:5]}
"""Defaults that differ from transformers', and are part of every recipe."""
HINTS = {
    **dict.fromkeys(("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), dict[str, Any] | None),
    **dict.fromkeys(("fsdp", "trackio_static_space_id"), bool | str | None),
    "debug": str,
}
"""Type hints in place of transformers', which are narrower than what it accepts, or cannot be written as text."""
SET_ELSEWHERE = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed", "resume_from_checkpoint": "output_dir"}
NOT_EVALUATED = (
    *("eval_strategy", "eval_on_start", "eval_delay", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "do_eval", "do_predict"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval"),
)
HUB = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision")
REFUSED = {
    "auto_find_batch_size": "after an out-of-memory error it would silently restart with a smaller batch: "
    "set per_device_train_batch_size and gradient_accumulation_steps",
    "enable_jit_checkpoint": "it saves in the middle of a step, which cannot be resumed exactly: set save_steps instead",
    "use_cache": "packed documents are masked apart only without a cache",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation would cast the weights for good: load the model in that dtype"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), "unit-wise rates need adept_fast.AdamW, set adam_beta1 and so on"),
    "parallelism_config": "choose DDP or FSDP2 by the options of accelerate launch",
}
"""Arguments that no trainer here supports, and why: only their default is accepted, in recipes and from Python."""
LEFT_OUT = {
    **REFUSED,
    **dict.fromkeys(NOT_EVALUATED, "held-out losses are logged every eval_steps, and nothing else is evaluated"),
    **dict.fromkeys(HUB, "checkpoints have only the copies; publish output_dir/tuned at the end"),
    "ignore_data_skip": "a resumed run would train on the first batches again",
    "restore_callback_states_from_checkpoint": "a resumed run restores them itself",
    "save_only_model": "a killed run could not resume its rates and moments",
}
"""Arguments refused in recipes."""


def refuse(args: TrainingArguments, copies: bool = False) -> None:
    """Raise InputError for TrainingArguments that no trainer here supports. copies: whether the trainer trains copies only."""
    for name, why in REFUSED.items():
        if (value := getattr(args, name, None)) not in (None, known()[name][1] if name in known() else None):
            raise InputError(f"{name}={shown(value)}: {why}: leave it out", name)
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in PLAIN_ADAMW:
        raise InputError(f"optim={optim}: unit-wise rates need adept_fast.AdamW: leave optim at its default", "optim")
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
        raise InputError(
            "push_to_hub: checkpoints have only the trained parameters, not a whole model: set hub_strategy='end' and call push_to_hub() "
            f"after training, which publishes the whole model (found {shown(str(args.hub_strategy))})"
        )
    if getattr(args.accelerator_config, "split_batches", False):
        raise InputError(
            "accelerator_config.split_batches: per_device_train_batch_size is always that of one process: leave split_batches out"
        )
    kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"  # its name before transformers 5.23
    kwargs = getattr(args, f"{kind}_checkpointing_kwargs")
    if copies and getattr(args, f"{kind}_checkpointing") and isinstance(kwargs, Mapping) and kwargs.get("use_reentrant"):
        raise InputError(
            "gradient_checkpointing_kwargs: use_reentrant=True gives no gradients to a layer whose input needs none, as the lowest copy: "
            "leave it out"
        )


@cache
def known() -> dict[str, tuple[Any, Any]]:
    """Return name -> (type hint, default) of all arguments."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {entry.name: (HINTS.get(entry.name, hints[entry.name]), entry.default) for entry in fields(TrainingArguments) if entry.init}


def checked(key: str, value: Any) -> Any:
    """Convert and check the value of an argument. Raises InputError with the values that it may have."""
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
    unset = type(value) is type(default) and value == default  # max_steps=-1, for example
    if (value is None and optional) or unset or (key == "lr_scheduler_type" and value in WSD):
        return value
    require(key, value, int if bounds is COUNT else kind if isinstance(bounds, Range) or not bounds else str, bounds or None)
    return value
