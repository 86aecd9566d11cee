"""The effect of each of transformers' TrainingArguments on a run: a resume is refused if an argument that changes the run differs.

An argument in none of these tables, such as one of a later transformers, counts as changing the run.
"""

from __future__ import annotations

NO_EFFECT = frozenset(
    (
        *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "report_to"),
        *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step"),
        *("logging_nan_inf_filter", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
        *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
        *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "enable_jit_checkpoint"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("eval_use_gather_object", "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
        *("bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("torch_empty_cache_steps", "ddp_timeout"),
    )
)
"""Logging, saving, evaluation, prefetching: same trained bits. (StagedTrainer restores the random state after evaluations.)"""

LAYOUT = frozenset(
    (
        *("per_device_train_batch_size", "gradient_accumulation_steps"),  # the global batch itself is compared
        *("activation_checkpointing", "gradient_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        *("use_cpu", "local_rank"),
        *("ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("fsdp", "fsdp_config"),
    )
)
"""Where and in which parts a global batch is computed: the same numbers up to rounding, as with another number of processes."""

SCHEDULE = frozenset(("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"))
"""Length and learning-rate schedule: compared for the steps that are done (tuning/resume.py)."""

def changes_the_run(name: str) -> bool:
    return name not in NO_EFFECT | LAYOUT | SCHEDULE
