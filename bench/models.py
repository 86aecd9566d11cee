"""What is benchmarked on: a model and a probe that --model and --probe name, or random ones of SmolLM2-135M's shape: the same work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from adept_fast.checkpoints import checkpoint
from adept_fast.data.items import IGNORE, Item, load_items

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a checkpoint folder or hub name; without it a random model of SmolLM2-135M's shape stands in")


def add_probe(parser: argparse.ArgumentParser, items: int | None = None) -> None:
    parser.add_argument("--probe", default="general", help="a probe file, with --model")
    parser.add_argument("--every", type=int, default=1, help="take every n-th item")
    help = "take so many items at most" + " (default: all; 64 random ones)" * (items is None)
    parser.add_argument("--items", type=int, default=items, help=help)


def model_name(given: argparse.Namespace) -> str:
    return Path(given.model).name if given.model else "random, SmolLM2-135M's shape"


def load_model(given: argparse.Namespace, dtype: str | None = None) -> Any:
    """In eval mode, on the CPU."""
    if given.model:
        return checkpoint.load_model(checkpoint.resolve(given.model), dtype=dtype).eval()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2)).eval()
    return model.to(getattr(torch, dtype)) if dtype else model


def load_items_of(given: argparse.Namespace) -> list[Item]:
    """Random ones, after load_model, are of 40 to 199 tokens, the last 11 supervised."""
    if given.model:
        return load_items(given.probe, checkpoint.load_tokenizer(checkpoint.resolve(given.model)))[:: given.every][: given.items]
    items = []
    for _ in range(given.items or 64):
        ids = torch.randint(3, SMOLLM2["vocab_size"], (int(torch.randint(40, 200, ())),)).tolist()
        items.append(Item(tuple(ids), tuple([IGNORE] * (len(ids) - 11) + ids[-11:])))
    return items
