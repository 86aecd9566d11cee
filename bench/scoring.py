"""Exact masking of all layers by the sweep against the ways it is done by hand, interleaved in one process.

    naive in file order, sorted     one forward with a hook for each layer, batches of 4 padded to their longest item, no_grad
    padded to 2,048                 the same with every item padded to 2,048 tokens: extrapolated from 3 forwards of one item
    own FLOP model                  2 FLOPs a weight and layer token of the sweep, causal attention, the head on the rows that count; at the
                                    rate of F.linear on the model's own layer matrices with as many rows as one layer call has

--part I/N runs one of N parts and keeps what it found in --into FILE; the result comes with the last one.
--naive-layers N runs, for each naive batch, the forward with all layers and those without N layers drawn at random instead of without each:
a masked forward runs every layer (the hook throws one's output away), so all take the same time. Seconds are then those measured, times the
forwards there are over those run, and scores are compared on the layers drawn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from adept_fast.data.items import IGNORE, Item
from adept_fast.models.decoder_layers import decoder_layers, device_of
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.packs import Pack, pack
from adept_fast.scoring.sweep import SweepPlan, flops, plan
from bench import parser
from bench.measure import device_name, now
from bench.models import add_model, add_probe, load_items_of, load_model, model_name

BATCH, REFERENCE_LENGTH = 4, 2048
WAYS = ("sweep", "naive_file_order", "naive_sorted")


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("scoring", __doc__)
    add_model(options)
    add_probe(options, items=8)
    options.add_argument("--naive-layers", type=int, metavar="N", help="masked forwards of each naive batch (default: all)")
    options.add_argument("--part", default="1/1", metavar="I/N", help="run this part only")
    options.add_argument("--into", type=Path, metavar="FILE", help="JSON file of the parts, with --part")
    given = options.parse_args(argv)
    part, parts = map(int, given.part.split("/"))
    model = load_model(given).to("cuda" if torch.cuda.is_available() else "cpu")
    items = load_items_of(given)
    planned = plan(model, items)
    if not planned.swept:
        raise RuntimeError("this model's layers cannot be run on a batch of variants: there is no sweep to time")
    found = _run(model, items, planned, part, parts, given.naive_layers or len(decoder_layers(model)))
    kept = json.loads(given.into.read_text()) if given.into and given.into.exists() else {}
    kept[given.part] = found
    if given.into:
        given.into.write_text(json.dumps(kept, allow_nan=False))
    if len(kept) < parts:
        return {"parts": sorted(kept), "of": parts}
    return {**_facts(model, items, planned, given), **_result(model, items, planned, list(kept.values()))}


def _run(model: torch.nn.Module, items: list[Item], planned: SweepPlan, part: int, parts: int, naive_layers: int) -> dict[str, Any]:
    """Of this part's packs and batches: seconds and forwards of each way; the sweep's loss differences by item; the naive ones by batch."""
    indices = list(range(len(items)))
    ordered = sorted(indices, key=lambda index: len(items[index].input_ids))
    work: dict[str, list[Any]] = {
        "sweep": pack(items, indices, planned.pack),
        "naive_file_order": [indices[start : start + BATCH] for start in range(0, len(items), BATCH)],
        "naive_sorted": [ordered[start : start + BATCH] for start in range(0, len(items), BATCH)],
    }
    count = len(decoder_layers(model))
    generator = torch.Generator().manual_seed(part)
    found: dict[str, Any] = {"seconds": dict.fromkeys(WAYS, 0.0), "swept": {}, "naive": [], "rates": [], "references": []}
    _naive(model, items[:1], ())  # warm-up
    with freed_memory_kept():  # for all ways
        for step in zip_longest(*(work[way][part - 1 :: parts] for way in WAYS)):
            for way, task in zip(WAYS, step, strict=True):
                if task is None:
                    continue
                start = now(device_of(model))
                if way == "sweep":
                    found["swept"] |= _swept(model, task, planned)
                    share = 1.0
                else:
                    layers = sorted(torch.randperm(count, generator=generator)[:naive_layers].tolist())
                    found["naive"].append([task, layers, _naive(model, [items[index] for index in task], layers).tolist()])
                    share = (1 + len(layers)) / (1 + count)
                found["seconds"][way] += (now(device_of(model)) - start) / share
            found["rates"].append(_matmul_rate(model, planned.tokens))
        for item in items[:3]:
            start = now(device_of(model))
            _naive(model, [item], (), REFERENCE_LENGTH)
            found["references"].append(now(device_of(model)) - start)
    return found


def _swept(model: torch.nn.Module, task: Pack, planned: SweepPlan) -> dict[str, list[float]]:
    losses = LayerMasks(model, planned).measure(task, range(len(decoder_layers(model))), ["answer"])["answer"]
    return {str(index): values for index, values in zip(task.items, (losses[:, 1:] - losses[:, :1]).tolist(), strict=True)}


@torch.no_grad()
def _naive(model: torch.nn.Module, items: list[Item], layers: Any, length: int = 0) -> torch.Tensor:
    """One forward with all layers, then one with each of `layers` bypassed by a forward hook; summed loss differences."""
    length = length or max(len(item.input_ids) for item in items)
    ids, mask = torch.zeros(len(items), length, dtype=torch.int64), torch.zeros(len(items), length, dtype=torch.int64)
    labels = torch.full((len(items), length), IGNORE)
    for row, item in enumerate(items):
        ids[row, : len(item.input_ids)] = torch.tensor(item.input_ids)
        labels[row, : len(item.labels)] = torch.tensor(item.labels)
        mask[row, : len(item.input_ids)] = 1
    ids, mask, labels = (tensor.to(device_of(model)) for tensor in (ids, mask, labels))

    def bypass(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def loss() -> float:
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return float(functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"))

    base, values = loss(), []
    for layer in layers:
        handle = decoder_layers(model)[layer].register_forward_hook(bypass, with_kwargs=True)
        values.append(loss() - base)
        handle.remove()
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def _matmul_rate(model: torch.nn.Module, rows: int) -> float:
    """FLOPs a second of F.linear over all layer matrices in turn, as the sweep meets them."""
    matrices = [parameter for parameter in decoder_layers(model).parameters() if parameter.ndim == 2]
    inputs = {width: torch.randn(rows, width).to(matrices[0]) for width in {matrix.shape[1] for matrix in matrices}}
    start = now(device_of(model))
    for matrix in matrices:
        functional.linear(inputs[matrix.shape[1]], matrix)
    return 2 * rows * sum(matrix.numel() for matrix in matrices) / (now(device_of(model)) - start)


def _result(model: torch.nn.Module, items: list[Item], planned: SweepPlan, parts: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = {way: sum(part["seconds"][way] for part in parts) for way in WAYS}
    swept = {int(index): values for part in parts for index, values in part["swept"].items()}
    largest = 0.0
    for batch, layers, values in (entry for part in parts for entry in part["naive"]):
        ours = torch.tensor([swept[index] for index in batch], dtype=torch.float64).sum(0)[layers]
        tokens = sum(items[index].supervised for index in batch)
        largest = max([largest, *((ours - torch.tensor(values, dtype=torch.float64)).abs() / tokens).tolist()])
    if largest > 1e-4:
        raise RuntimeError(f"the sweep's scores differ from the naive ones by {largest:.2g}, above 1e-4: nothing is timed that is wrong")
    rate = statistics.median(rate for part in parts for rate in part["rates"])
    reference = statistics.median(time for part in parts for time in part["references"]) * len(items) * (1 + len(decoder_layers(model)))
    modelled = sum(flops(model, alone, range(len(decoder_layers(model))), planned) for alone in pack(items, range(len(items)), 0)) / rate
    return {
        **{f"{way}_seconds": round(seconds[way], 2) for way in WAYS},
        "padded_to_2048_seconds_extrapolated": round(reference),
        "flop_model_seconds": round(modelled, 2),
        "matmul_gflops": round(rate / 1e9, 1),
        "sweep_over_naive_file_order": round(seconds["sweep"] / seconds["naive_file_order"], 4),
        "sweep_over_naive_sorted": round(seconds["sweep"] / seconds["naive_sorted"], 4),
        "sweep_over_padded_to_2048": round(seconds["sweep"] / reference, 5),
        "sweep_over_flop_model": round(seconds["sweep"] / modelled, 3),
        "largest_difference_of_a_batch_s_score": largest,
    }


def _facts(model: torch.nn.Module, items: list[Item], planned: SweepPlan, given: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": device_name(device_of(model)),
        "threads": torch.get_num_threads(),
        "model": model_name(given),
        "probe": Path(given.probe).name if given.model else "random",
        "items": len(items),
        "tokens": sum(len(item.input_ids) for item in items),
        "supervised_tokens": sum(item.supervised for item in items),
        "naive_layers": given.naive_layers or "all",
        "parts": int(given.part.split("/")[1]),
        "layer_call_tokens": planned.tokens,
        "pack_tokens": planned.pack,
    }
