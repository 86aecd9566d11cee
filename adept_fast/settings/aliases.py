"""Names that other tools (transformers, TRL, LLaMA-Factory, Axolotl, Unsloth, ms-swift, torch) use for a setting, and the answer to one."""

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
    **dict.fromkeys(("dataset_dir", "data_dir", "train_dir", "pretraining_dataset", "input", "documents"), DOMAIN),
    **dict.fromkeys(("general", "calibration", "calib", "probe_data", "benchmark"), ("probe",)),
    **dict.fromkeys(("eval_dataset", "eval_file", "eval_data", "validation_file", "val_file", "test_file"), ("eval.domain",)),
    **dict.fromkeys(("val_dataset", "val_data"), ("eval.domain",)),
    **dict.fromkeys(("output", "out", "out_dir", "outdir", "output_path", "output_folder", "save_dir", "dir", "destination"), TARGET),
    **{"output_dir": ("target",), "model_name_or_path": ("source", "base")},  # for commands without such a key
    **dict.fromkeys(("random_seed", "manual_seed", "data_seed", "random_state"), ("seed",)),
    **dict.fromkeys(("lr", "rate", "learning_rates", "base_lr", "max_lr"), ("tune.learning_rate",)),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), EPOCHS),
    **dict.fromkeys(("batch_size", "bs", "batch", "micro_batch_size", "train_batch_size", "per_device_batch_size"), BATCH),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_train_steps", "iters", "max_iters"), ("tune.max_steps",)),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"), ("tune.gradient_accumulation_steps",)),
    **dict.fromkeys(("gas", "accumulate_grad_batches", "grad_accumulation"), ("tune.gradient_accumulation_steps",)),
    **dict.fromkeys(("max_length", "max_seq_length", "seq_len", "seq_length", "sequence_len", "cutoff_len"), ("tune.block_size",)),
    **dict.fromkeys(("context_length", "block", "max_len", "model_max_length", "max_seq_len"), ("tune.block_size",)),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"), ("tune.warmup_steps",)),
    **dict.fromkeys(("scheduler", "lr_scheduler", "schedule", "lr_schedule"), ("tune.lr_scheduler_type",)),
    **dict.fromkeys(("wd", "decay"), ("tune.weight_decay",)),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clipping", "clip", "max_norm", "gradient_clip_val"), ("tune.max_grad_norm",)),
    **{"beta1": ("tune.adam_beta1",), "betas": ("tune.adam_beta1",), "beta2": ("tune.adam_beta2",)},
    **dict.fromkeys(("eps", "epsilon", "adam_eps"), ("tune.adam_epsilon",)),
    **dict.fromkeys(("optimizer",), ("tune.optim",)),
    **dict.fromkeys(("mixed_precision", "amp", "pure_bf16", "autocast"), ("tune.bf16",)),
    **dict.fromkeys(("gradient_ckpt", "grad_checkpointing", "checkpointing"), ("tune.gradient_checkpointing",)),
    **dict.fromkeys(("workers", "num_workers"), ("tune.dataloader_num_workers",)),
    **dict.fromkeys(("logger", "wandb", "tracker"), ("tune.report_to",)),
    **dict.fromkeys(("device", "cpu", "no_cuda"), ("tune.use_cpu",)),
    **dict.fromkeys(("log_interval", "log_every", "log_steps"), ("tune.logging_steps",)),
    **dict.fromkeys(("save_interval", "save_every", "saves_per_epoch"), ("tune.save_steps",)),
    **dict.fromkeys(("eval_interval", "eval_every", "evals_per_epoch"), ("tune.eval_steps",)),
    **dict.fromkeys(("stream",), ("tune.streaming",)),
    **dict.fromkeys(("replay_data", "replay_dataset", "general_data"), ("tune.replay",)),
    **dict.fromkeys(("kl", "kl_weight", "kl_coef", "anchor"), ("tune.anchor_weight",)),
    **dict.fromkeys(("r", "rank", "lora_r"), ("tune.lora_rank",)),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "adapter"), ("method",)),
    **dict.fromkeys(("use_peft", "use_lora", "full_finetuning"), ("method",)),
    **dict.fromkeys(("max_tokens", "n_predict", "max_new"), ("max_new_tokens", "eval.answer_tokens")),
    **dict.fromkeys(("num_layers", "num_copies", "n_layers", "copies", "layers_to_add", "num_layer_trainable"), ("expand.k",)),
    **dict.fromkeys(("new_layers", "num_new_layers", "freeze_trainable_layers"), ("expand.k",)),
    **dict.fromkeys(("expand_layers", "layer_ids", "insert_layers"), ("expand.layers",)),
    **dict.fromkeys(("init", "initialization", "layer_init"), ("expand.initialisation",)),
    **dict.fromkeys(("max_samples", "limit", "num_samples"), ("score.max_items", "eval.max_items")),
}
"""A name -> keys that it may stand for. The first that the command has is suggested."""

LORA = "method=lora trains LoRA of rank tune.lora_rank on all linear layers, with alpha twice the rank and no dropout"
HELD_OUT = "2 % of the domain's documents are held out in any case; eval.domain names others to measure on"
PACKED = "documents are always packed, and masked from each other"
SOURCE = "a source takes it, as in domain={path: my.jsonl, column: body, template: chat}"
MIXTURE = "a source takes weight or share, as in domain=[{path: a.txt, weight: 2}, b.txt]"
FROZEN = "the copies are trained and all else is frozen; method=full trains everything"
LAUNCHER = "the launcher says it: torchrun --nproc-per-node 2 -m adept_fast tune my.yaml; CUDA_VISIBLE_DEVICES chooses the GPUs"
NOTES = {
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target", "lora_targets", "lora_target_linear", "lora_target_modules"), LORA),
    **dict.fromkeys(("target_modules", "lora_modules_to_save", "peft_config"), LORA),
    **dict.fromkeys(("val_size", "val_set_size", "test_size", "val_split", "split_dataset_ratio", "validation_split_percentage"), HELD_OUT),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing", "pad_to_sequence_len", "padding_free", "pad_to_max_length"), PACKED),
    **dict.fromkeys(("template", "chat_template", "prompt_template", "column", "text_column", "text_field"), SOURCE),
    **dict.fromkeys(("dataset_text_field", "split", "dataset_split", "train_split", "columns"), SOURCE),
    **dict.fromkeys(("interleave_probs", "mix_strategy", "dataset_probs", "weight", "share", "mixture"), MIXTURE),
    **dict.fromkeys(("freeze", "freeze_layers", "freeze_parameters", "unfrozen_parameters", "trainable_parameters"), FROZEN),
    **dict.fromkeys(("devices", "gpus", "gpu", "num_gpus", "n_gpu", "nproc_per_node", "num_processes", "world_size"), LAUNCHER),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization", "bnb_4bit_compute_dtype"),
        "models are not quantised here; dtype=bfloat16 takes half the memory of float32",
    ),
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite_cache", "overwrite", "force"),
        "nothing is overwritten: choose another output_dir, or remove the folder",
    ),
    **dict.fromkeys(
        ("resume", "resume_training", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
        "leave it out: the same command goes on from where it stopped",
    ),
    **dict.fromkeys(("cache_dir", "dataset_prepared_path"), "set HF_HOME, or ADEPT_FAST_CACHE for what adept-fast keeps"),
    **dict.fromkeys(("hf_token", "token", "use_auth_token", "api_key"), "set HF_TOKEN in the environment"),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_name", "use_wandb"),
        "set tune.report_to=wandb, and WANDB_PROJECT in the environment",
    ),
    **dict.fromkeys(
        ("global_batch_size", "total_batch_size", "effective_batch_size"),
        "it is tune.per_device_train_batch_size times tune.gradient_accumulation_steps times the number of processes",
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_name", "tokenizer_path", "tokenizer_type", "config_name", "model_type"),
        "config and tokenizer are those in model_name_or_path",
    ),
    **dict.fromkeys(("plot_loss", "plot"), "report.html always has the curves"),
    **dict.fromkeys(("flash_attn", "flash_attention"), "for example attn_implementation=flash_attention_2"),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "adapter"), "adept, full, lora or replay, for example"),
    "stage": "leave it out: method=... says what is trained, and each record of domain by its keys how it is read",
    **dict.fromkeys(("use_peft", "use_lora"), "method=lora"),
    **dict.fromkeys(("mixed_precision", "amp", "pure_bf16", "autocast"), "tune.bf16=true"),
    **dict.fromkeys(("device", "cpu", "no_cuda"), "tune.use_cpu=true; a GPU is used where there is one"),
    **dict.fromkeys(("logger", "wandb", "tracker"), "tune.report_to=wandb, for example"),
    **dict.fromkeys(("saves_per_epoch", "evals_per_epoch"), "a number of steps"),
    "warmup_ratio": "a number below 1 is a share of the steps",
    "betas": "and tune.adam_beta2",
    "full_finetuning": "method=full",
}
"""A name -> what to write in its place, or what is done without it."""


def hint(key: str, known: Collection[str]) -> str:
    """Answer an unknown key: the keys that may be meant, what to write, both, or "".

    key, known: full names, such as "tune.learning_rate".
    """
    near = suggestions(key, known)
    note = NOTES.get(_word(key), "") if "domain" in known else ""
    if near:
        return f"did you mean {' or '.join(near)}?" + (f" ({note})" if note else "")
    if alias := "" if note else next(iter(difflib.get_close_matches(_word(key), [*ALIASES, *NOTES], n=1, cutoff=0.85)), ""):
        return hint(alias, known)
    return note


def suggestions(key: str, known: Collection[str]) -> tuple[str, ...]:
    """Suggest keys for an unknown one: by ALIASES, by the same name in another table, else by the nearest name. May be empty.

    key, known: full names, such as "tune.learning_rate".
    """
    word = _word(key)
    last = {name: name.rpartition(".")[2] for name in known}
    table = ALIASES.get(word, ())
    at_hand = [name for name in table if "." in key and name.startswith(f"{key.rpartition('.')[0]}.")]
    names = (*at_hand, *table, *(name.rpartition(".")[2] for name in table))
    if by_table := next((name for name in names if name in last), None):
        return (by_table,)
    if word in NOTES and "domain" in known:
        return ()
    beside = [name for name in last if name.rpartition(".")[0] == key.rpartition(".")[0]]
    for places in (beside, last):
        if same := tuple(sorted(name for name in places if last[name] == word)):
            return same
    near = [(_likeness(word, last[name]), name in beside, last[name]) for name in sorted(last)]
    likeness, here, nearest = max(near, default=(0.0, False, ""))
    if likeness < (0.6 if here else 0.75):
        return ()
    return tuple(sorted(name for name in (beside if here else last) if last[name] == nearest))


def _likeness(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word, name).ratio()


def _word(key: str) -> str:
    return key.rpartition(".")[2].strip().lstrip("-").lower().replace("-", "_")
