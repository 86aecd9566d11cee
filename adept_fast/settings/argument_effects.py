"""What each of transformers' TrainingArguments does to a run, declared once: so a resume is barred by what changes it, and by nothing else.

An argument that stands in none of these tables, as one of a later transformers, counts as one that changes the run.
"""

from __future__ import annotations

NO_BIT = frozenset(
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
"""What is said, kept, measured and read ahead: every trained bit is the same. (Evaluations leave the random state alone: StagedTrainer.)"""

LAYOUT = frozenset(
    (
        *("per_device_train_batch_size", "gradient_accumulation_steps"),  # whose product over all processes is the global batch
        *("activation_checkpointing", "gradient_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        *("use_cpu", "local_rank"),
        *("ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("fsdp", "fsdp_config"),
    )
)
"""Where and in which pieces a global batch is computed: the same numbers to rounding, as on another number of processes."""

SCHEDULE = frozenset(("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"))
"""How long a run is, and its learning rate over that: compared step by step, for the steps that are done (tuning/resume.py)."""

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


def changes_the_run(name: str) -> bool:
    """Whether an argument of another value makes another run of it: every one that is not known to do less."""
    return name not in NO_BIT | LAYOUT | SCHEDULE
