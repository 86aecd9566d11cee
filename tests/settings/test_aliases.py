"""The names that users of other tools type are answered with the right key, or with what is done without one."""

from __future__ import annotations

import re

import pytest

from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.copies import run
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe, load
from adept_fast.settings.aliases import ALIASES, NOTES, hint
from adept_fast.settings.key_value import keys_of

NEEDED = ("model_name_or_path=M", "domain=my.txt")
KNOWN = tuple(keys_of(Recipe))
MEANT = {
    "transformers": {
        "train_file": "domain", "validation_file": "eval.domain", "block_size": "tune.block_size", "torch_dtype": "dtype",
        "warmup_ratio": "tune.warmup_steps", "per_gpu_train_batch_size": "tune.per_device_train_batch_size", "model_revision": "revision",
        "num_train_epochs": "tune.num_train_epochs", "bf16": "tune.bf16", "max_steps": "tune.max_steps", "data_seed": "seed",
        "pretrained_model_name_or_path": "model_name_or_path", "report_to": "tune.report_to", "fsdp": "tune.fsdp",
    },
    "TRL": {
        "dataset_name": "domain", "max_length": "tune.block_size", "max_seq_length": "tune.block_size", "lora_r": "tune.lora_rank",
        "train_dataset": "domain", "eval_dataset": "eval.domain", "use_peft": "method",
    },
    "LLaMA-Factory": {
        "finetuning_type": "method", "dataset": "domain", "dataset_dir": "domain", "cutoff_len": "tune.block_size",
        "max_samples": "score.max_items", "flash_attn": "attn_implementation", "pure_bf16": "tune.bf16", "num_layer_trainable": "expand.k",
        "freeze_trainable_layers": "expand.k", "lr_scheduler_type": "tune.lr_scheduler_type", "lora_rank": "tune.lora_rank",
    },
    "Axolotl": {
        "base_model": "model_name_or_path", "datasets": "domain", "sequence_len": "tune.block_size", "num_epochs": "tune.num_train_epochs",
        "micro_batch_size": "tune.per_device_train_batch_size", "lr_scheduler": "tune.lr_scheduler_type", "optimizer": "tune.optim",
        "flash_attention": "attn_implementation", "saves_per_epoch": "tune.save_steps", "evals_per_epoch": "tune.eval_steps",
        "adapter": "method", "pretraining_dataset": "domain", "gradient_accumulation_steps": "tune.gradient_accumulation_steps",
    },
    "Unsloth": {"model_name": "model_name_or_path", "r": "tune.lora_rank", "full_finetuning": "method", "random_state": "seed"},
    "ms-swift": {
        "model": "model_name_or_path", "train_type": "method", "tuner_type": "method", "val_dataset": "eval.domain",
        "attn_impl": "attn_implementation", "streaming": "tune.streaming", "output": "output_dir",
    },
    "torch and Lightning": {
        "lr": "tune.learning_rate", "wd": "tune.weight_decay", "betas": "tune.adam_beta1", "eps": "tune.adam_epsilon", "epochs":
        "tune.num_train_epochs", "batch_size": "tune.per_device_train_batch_size", "accumulate_grad_batches":
        "tune.gradient_accumulation_steps", "gradient_clip_val": "tune.max_grad_norm", "num_workers": "tune.dataloader_num_workers",
        "precision": "dtype", "amp": "tune.bf16", "device": "tune.use_cpu",
    },
    "guesses": {
        "data": "domain", "dataset_path": "domain", "out": "output_dir", "num_layers": "expand.k", "layers": "expand.layers",
        "copies": "expand.k", "kl": "tune.anchor_weight", "replay": "tune.replay", "steps": "tune.max_steps", "benchmark": "probe",
        "modell": "model_name_or_path", "eval_step": "tune.eval_steps", "sead": "seed", "Seed": "seed",
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", MEANT)
def test_the_names_of_a_tool_are_answered_with_the_key(tool: str) -> None:
    wrong = {name: hint(name, KNOWN) for name, key in MEANT[tool].items() if not hint(name, KNOWN).startswith(f"did you mean {key}?")}
    assert not wrong


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        ("lora_alpha lora_dropout lora_target lora_target_modules target_modules", "tune.lora_rank on all linear layers"),
        ("stage tune.stage", "leave it out: method=... says what is trained"),
        ("val_size val_set_size split_dataset_ratio validation_split_percentage tune.val_size", "eval.domain names others"),
        ("packing sample_packing neat_packing tune.packing", "always packed"),
        ("template chat_template dataset_text_field column", "domain={path: my.jsonl, column: body, template: chat}"),
        ("mix_strategy interleave_probs", "weight or share"),
        ("load_in_4bit quantization_bit tune.load_in_8bit", "dtype=bfloat16"),
        ("overwrite_output_dir overwrite_cache", "nothing is overwritten"),
        ("resume resume_from_checkpoint", "the same command goes on"),
        ("devices num_gpus nproc_per_node num_gpu", "torchrun --nproc-per-node"),
        ("cache_dir", "HF_HOME"),
        ("hf_token", "HF_TOKEN"),
        ("tokenizer_name model_type", "those in model_name_or_path"),
        ("freeze unfrozen_parameters", "method=full"),
        ("global_batch_size", "times the number of processes"),
        ("flash_attention", "attn_implementation=flash_attention_2"),
        ("warmup_ratio", "share of the steps"),
        ("use_lora", "(method=lora)"),
    ],
)
def test_what_has_no_key_or_other_values_is_told(names: str, answer: str) -> None:
    assert all(answer in hint(name, KNOWN) for name in names.split())


MORE = [
    ("tune.lr", "tune.learning_rate"),
    ("tune.learning-rate", "tune.learning_rate"),
    ("tune.dataset", "domain"),
    ("tune.output_dir", "output_dir"),
    ("tune.seed", "seed"),
    ("k", "expand.k"),
    ("score.k", "expand.k"),
    ("expand.num_layers", "expand.k"),
    ("eval.max_samples", "eval.max_items"),
    ("max_items", "eval.max_items or score.max_items or tune.max_items"),
    ("max_step", "tune.max_steps"),
    ("tuning.lr", "tune"),
    ("scores.max_items", "score"),
]


@pytest.mark.parametrize(("key", "meant"), MORE)
def test_a_key_of_another_table_or_misspelt_is_answered_with_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(InputError) as refused:
        load(None, [*NEEDED, f"{key}=1"])
    answer = f"{key} is set by the recipe's {meant}" if key in ("tune.seed", "tune.output_dir") else f"did you mean {meant}?"
    assert str(refused.value).endswith(answer), refused.value


def test_what_is_near_nothing_is_not_answered_with_a_guess() -> None:
    for word in ("verbose", "system", "train_on_inputs", "low_cpu_mem_usage", "xyzzy"):
        assert hint(word, KNOWN) == "", word
    with pytest.raises(InputError, match="^unknown key tune.xyzzy: adept-fast recipe all=true lists all$"):
        load(None, [*NEEDED, "tune.xyzzy=1"])


def test_every_alias_stands_for_keys_that_there_are_and_is_none_itself() -> None:
    elsewhere = {name for command in COMMANDS.values() for kind in command.declarations for name in keys_of(kind)}
    for word, keys in ALIASES.items():
        assert keys and {*keys} <= elsewhere, word
        assert word not in keys, word


def test_every_setting_that_a_note_writes_is_one() -> None:
    for word, note in NOTES.items():
        assert word not in KNOWN, word
        for key in re.findall(r"\b(?:(?:tune|eval)\.[a-z_0-9]+|[a-z_]+(?==))", note):
            assert key in KNOWN, (word, key)


def test_a_command_of_other_keys_is_told_its_own() -> None:
    for key, meant in (("model", "source"), ("output", "target"), ("output_dir", "target"), ("aplha", "alpha")):
        with pytest.raises(InputError, match=f"unknown key {key}: did you mean {meant}"):
            run("copies dial", ["source=a", "target=b", "alpha=0.5", f"{key}=1"])
