"""Every TrainingArguments field is sorted by what it does to a run, and one that is not known counts as one that changes it."""

from __future__ import annotations

from itertools import combinations

from adept_fast.settings.argument_effects import LAYOUT, NO_EFFECT, SCHEDULE, changes_the_run
from adept_fast.settings.training_arguments import known

CHANGES = frozenset(
    (
        *("learning_rate", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices"),
        *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
        *("liger_kernel_config", "use_cache", "auto_find_batch_size"),
        *("full_determinism", "seed", "data_seed", "accelerator_config", "parallelism_config", "deepspeed"),
        *("dataloader_drop_last", "dataloader_in_order", "remove_unused_columns", "label_names"),
        *("train_sampling_strategy", "length_column_name"),
        "dataloader_persistent_workers",  # workers that are kept draw no new seed each epoch, so dropout goes on otherwise
    )
)
"""Reviewed: these do change the run. A new argument of transformers belongs here or into a table of the package."""


def test_every_argument_of_the_installed_transformers_is_sorted_once() -> None:
    tables = NO_EFFECT, LAYOUT, SCHEDULE, CHANGES
    assert all(not one & other for one, other in combinations(tables, 2))
    assert frozenset().union(*tables) >= known().keys()


def test_an_unknown_argument_changes_the_run() -> None:
    assert changes_the_run("invented_in_a_later_version") and all(map(changes_the_run, CHANGES))
    assert not any(map(changes_the_run, NO_EFFECT | LAYOUT | SCHEDULE))
