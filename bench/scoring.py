"""Masking by one sweep against one forward with a hook per layer: the same scores, and the time of each, interleaved item by item.

Without --model a random model of SmolLM2-135M's shape and random items stand in: the same work, other scores.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.nn import functional

from adept_fast.data.items import IGNORE, Item, load_items
from adept_fast.families import decoder_layers, device_of
from adept_fast.importance import masking

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


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench scoring", description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder or hub name")
    parser.add_argument("--probe", default="general", help="a probe file, with --model")
    parser.add_argument("--items", type=int, default=16)
    given = parser.parse_args(argv)
    model, items = _inputs(given)
    device = device_of(model)
    swept, hooked = 0.0, 0.0
    differences = torch.zeros(len(decoder_layers(model)), 2, dtype=torch.float64)  # summed over items: sweep, hooks
    if not masking.sweeps_exactly(model, items[0]):
        raise RuntimeError("this model's layers cannot be run on a batch of variants: there is no sweep to time")
    by_hooks(model, items[0])  # warm-up
    for item in items:
        _wait(device)
        start = time.perf_counter()
        losses = masking.measure(model, item, all_tokens=False)["answer"]
        _wait(device)
        middle = time.perf_counter()
        plain = by_hooks(model, item)
        _wait(device)
        swept, hooked = swept + middle - start, hooked + time.perf_counter() - middle
        swept_values = [loss - losses[0] for loss in losses[1:]]
        differences += torch.stack([torch.tensor(swept_values).double(), torch.tensor(plain).double() * item.supervised], 1)
    tokens = sum(item.supervised for item in items)
    largest = float((differences[:, 0] - differences[:, 1]).abs().max() / tokens)
    if largest > 1e-4:
        raise RuntimeError(f"the sweep's scores differ from those by hooks by {largest:.2g}, above 1e-4: nothing is timed that is wrong")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "model": given.model or "random, SmolLM2-135M's shape",
        "items": len(items),
        "tokens": sum(len(item.input_ids) for item in items),
        "supervised_tokens": tokens,
        "sweep_seconds": round(swept, 3),
        "hooks_seconds": round(hooked, 3),
        "ratio": round(swept / hooked, 4),
        "largest_difference_of_a_score": largest,
    }


def _inputs(given: argparse.Namespace) -> tuple[Any, list[Item]]:
    if given.model:
        from adept_fast import checkpoint

        folder = checkpoint.resolve(given.model)
        return checkpoint.load_model(folder), load_items(given.probe, checkpoint.load_tokenizer(folder))[: given.items]
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2)).eval()
    items = []
    for _ in range(given.items):
        ids = torch.randint(3, SMOLLM2["vocab_size"], (int(torch.randint(40, 200, ())),)).tolist()
        items.append(Item(tuple(ids), tuple([IGNORE] * (len(ids) - 11) + ids[-11:])))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), items


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def by_hooks(model: torch.nn.Module, item: Item) -> list[float]:
    """One forward with all layers, then one with each bypassed by a forward hook; loss differences on the supervised tokens."""

    def bypass(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    ids = torch.tensor([item.input_ids], device=device_of(model))
    labels = torch.tensor(item.labels[1:], device=ids.device)

    def loss() -> float:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        return float(functional.cross_entropy(logits, labels, ignore_index=IGNORE))

    base, values = loss(), []
    for layer in decoder_layers(model):
        handle = layer.register_forward_hook(bypass, with_kwargs=True)
        values.append(loss() - base)
        handle.remove()
    return values
