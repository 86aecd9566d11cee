"""Names that other tools (transformers, TRL, LLaMA-Factory, Axolotl, torch) use for a setting, and suggestions for unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Collection

MODEL, TARGET, DOMAIN = ("model_name_or_path", "source", "base"), ("output_dir", "target"), ("domain",)
BATCH, EPOCHS = ("tune.per_device_train_batch_size",), ("tune.num_train_epochs",)
ALIASES = {
    **dict.fromkeys(("model", "model_name", "model_path", "base_model", "model_id", "pretrained_model_name_or_path", "checkpoint"), MODEL),
    **dict.fromkeys(("model_revision",), ("revision",)),
    **dict.fromkeys(("torch_dtype", "precision", "load_dtype"), ("dtype",)),
    **dict.fromkeys(("flash_attn", "attn", "attention", "attn_impl", "flash_attention"), ("attn_implementation",)),
    **dict.fromkeys(("remote_code", "trust_code"), ("trust_remote_code",)),
    **dict.fromkeys(("data", "dataset", "datasets", "dataset_name", "dataset_path", "data_path", "corpus", "text"), DOMAIN),
    **dict.fromkeys(("train_file", "train_data", "train_dataset", "training_data", "train", "file", "files", "texts"), DOMAIN),
    **dict.fromkeys(("general", "calibration", "calib", "probe_data", "benchmark"), ("probe",)),
    **dict.fromkeys(("eval_dataset", "eval_file", "eval_data", "validation_file", "val_file", "test_file"), ("eval.domain",)),
    **dict.fromkeys(("output", "out", "out_dir", "outdir", "output_path", "output_folder", "save_dir", "dir", "destination"), TARGET),
    **{"output_dir": ("target",), "model_name_or_path": ("source", "base")},  # for commands without such a key
    **dict.fromkeys(("random_seed", "manual_seed", "data_seed"), ("seed",)),
    **dict.fromkeys(("lr", "rate", "learning_rates", "base_lr", "max_lr"), ("tune.learning_rate",)),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), EPOCHS),
    **dict.fromkeys(("batch_size", "bs", "batch", "micro_batch_size", "train_batch_size", "per_device_batch_size"), BATCH),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_train_steps", "iters", "max_iters"), ("tune.max_steps",)),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"), ("tune.gradient_accumulation_steps",)),
    **dict.fromkeys(("max_length", "max_seq_length", "seq_len", "seq_length", "sequence_len", "cutoff_len"), ("tune.block_size",)),
    **dict.fromkeys(("context_length", "block", "max_len"), ("tune.block_size",)),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"), ("tune.warmup_steps",)),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule", "lr_schedule"), ("tune.lr_scheduler_type",)),
    **dict.fromkeys(("wd", "decay"), ("tune.weight_decay",)),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clipping", "clip", "max_norm"), ("tune.max_grad_norm",)),
    **{"beta1": ("tune.adam_beta1",), "beta2": ("tune.adam_beta2",)},
    **dict.fromkeys(("eps", "epsilon", "adam_eps"), ("tune.adam_epsilon",)),
    **dict.fromkeys(("optimizer",), ("tune.optim",)),
    **dict.fromkeys(("gradient_ckpt", "grad_checkpointing", "checkpointing"), ("tune.gradient_checkpointing",)),
    **dict.fromkeys(("workers", "num_workers"), ("tune.dataloader_num_workers",)),
    **dict.fromkeys(("logger", "wandb"), ("tune.report_to",)),
    **dict.fromkeys(("stream",), ("tune.streaming",)),
    **dict.fromkeys(("r", "rank", "lora_r"), ("tune.lora_rank",)),
    **dict.fromkeys(("finetuning_type", "train_type", "stage"), ("method",)),
    **dict.fromkeys(("num_layers", "num_copies", "n_layers", "copies", "layers_to_add", "num_layer_trainable"), ("expand.k",)),
    **dict.fromkeys(("init", "initialization", "layer_init"), ("expand.initialisation",)),
    **dict.fromkeys(("max_samples", "limit", "num_samples"), ("score.max_items", "eval.max_items")),
}
"""A name -> keys that it may stand for. The first that the command has is suggested."""


def suggestions(key: str, known: Collection[str]) -> tuple[str, ...]:
    """Suggest keys for an unknown one: by ALIASES, by the same name in another table, else by the nearest name. May be empty.

    key, known: full names, such as "tune.learning_rate".
    """
    word = key.rpartition(".")[2].strip().lstrip("-").lower().replace("-", "_")
    last = {name: name.rpartition(".")[2] for name in known}
    table = ALIASES.get(word, ())
    by_table = next((name for name in (*table, *(name.rpartition(".")[2] for name in table)) if name in last), None)
    if by_table:
        return (by_table,)
    beside = [name for name in last if name.rpartition(".")[0] == key.rpartition(".")[0]]
    for names in (beside, last):
        if same := tuple(sorted(name for name in names if last[name] == word)):
            return same
    for names, cutoff in ((beside, 0.5), (list(last), 0.75)):
        near = difflib.get_close_matches(word, sorted({last[name] for name in names}), n=1, cutoff=cutoff)
        if near:
            return tuple(sorted(name for name in names if last[name] == near[0]))
    return ()
