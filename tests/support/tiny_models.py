"""Tiny random models and a tiny tokenizer: every structure of the real ones, in milliseconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from adept_fast.data.items import IGNORE, Item

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SENTENCES = [
    f"The {animal} number {number} walks to the {place} and counts {number * number} stones before it sleeps."
    for number in range(2, 12)
    for animal, place in (("heron", "river"), ("badger", "hill"), ("otter", "lake"), ("fox", "old wood"))
]


def model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """Random weights, biases and norms (neutral ones would hide faults), large enough that every layer matters."""
    config = AutoConfig.for_model(family, **{**SHAPE, **changes})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and parameter.ndim == 1 else 0.2 * noise)
    return made.to(dtype).eval()


@cache
def tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    """begins: every text with <s>, as most do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    if begins:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<pad>", bos_token="<s>", eos_token="</s>")


def checkpoint(folder: Path, family: str = "llama", begins: bool = False, **changes: object) -> Path:
    model(family, **changes).save_pretrained(folder)
    tokenizer(begins).save_pretrained(folder)
    return folder


def items(count: int = 5, seed: int = 0, longest: int = 40) -> list[Item]:
    """Random items of unequal length, each supervised on its second half."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, longest, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        made.append(Item(tuple(ids), tuple([IGNORE] * (length // 2) + ids[length // 2 :])))
    return made
