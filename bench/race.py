"""The race for the k lowest layers against the exact sweep of the same items, their packs in turn in one process.

    python -m bench race --model SMOLLM2 --probe PROBE --into FILE --seconds 240

Run it again until it prints the result: FILE stores the time and the losses of each pack. Regret is measured: the exact importances of the
raced choice, summed, minus those of the exact one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast.models.decoder_layers import decoder_layers, device_of
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.packs import Pack, pack
from adept_fast.scoring.race import Race, run
from adept_fast.scoring.sweep import plan
from bench import parser
from bench.measure import device_name
from bench.models import add_model, add_probe, load_items_of, load_model, model_name
from bench.stored_results import StoredResults


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("race", __doc__)
    add_model(options)
    add_probe(options)
    options.add_argument("--longest", type=int, default=320, help="take the items that fit so many tokens")
    options.add_argument("--k", type=int, default=4, help="layers to be found")
    options.add_argument("--regret", type=float, default=0.04, help="that the race may have, nats per token")
    options.add_argument("--seed", type=int, default=0, help="of the order of the items")
    StoredResults.add_to(options)
    given = options.parse_args(argv)
    model = load_model(given).to("cuda" if torch.cuda.is_available() else "cpu")
    items = [item for item in load_items_of(given) if len(item.input_ids) <= given.longest]
    planned, layers = plan(model, items), len(decoder_layers(model))
    tokens = torch.tensor([item.supervised for item in items], dtype=torch.float64)
    store, seconds = StoredResults(given), {"race": 0.0, "exact": 0.0}

    def measured(way: str, part: Pack, without: Sequence[int]) -> Tensor:
        """Loss differences of the items of a pack, fp64 [items, layers]."""

        def timed() -> list[Any]:
            start = time.perf_counter()
            losses = LayerMasks(model, planned).measure(part, without, ["answer"])["answer"]
            return [time.perf_counter() - start, (losses[:, 1:] - losses[:, :1]).tolist()]

        took, values = store.get(json.dumps([way, part.items, list(without)]), timed)
        seconds[way] += took
        differences = torch.full((len(part.items), layers), torch.nan, dtype=torch.float64)
        differences[:, list(without)] = torch.tensor(values, dtype=torch.float64)
        return differences

    exact = torch.empty(len(items), layers, dtype=torch.float64)
    waiting = pack(items, range(len(items)), planned.pack)

    def next_exact() -> None:
        if waiting:
            part = waiting.pop(0)
            exact[list(part.items)] = measured("exact", part, range(layers))

    def measure(indices: Sequence[int], racing: Sequence[int]) -> Tensor:
        found = torch.empty(len(items), layers, dtype=torch.float64)
        for part in pack(items, indices, planned.pack):
            found[list(part.items)] = measured("race", part, racing)
            next_exact()
        return found[list(indices)]

    race = Race(k=given.k, regret=given.regret)
    with freed_memory_kept():
        LayerMasks(model, planned).measure(waiting[0], range(0, layers, 8), ["answer"])  # warm-up
        outcome = run(race, tokens, layers, measure, given.seed)
        while waiting:
            next_exact()
    values = exact.sum(0) / tokens.sum()
    best = values.argsort()[: given.k]
    return {
        "device": device_name(device_of(model)),
        "threads": torch.get_num_threads(),
        "model": model_name(given),
        "items": len(items),
        "supervised_tokens": int(tokens.sum()),
        "raced_items": outcome.items,
        "layers": list(outcome.layers),
        "exact_layers": sorted(best.tolist()),
        "regret_measured": float(values[list(outcome.layers)].sum() - values[best].sum()),
        "regret_bound": outcome.bound,
        "confidence": race.confidence,
        "race_seconds": round(seconds["race"], 2),
        "exact_seconds": round(seconds["exact"], 2),
        "race_over_exact": round(seconds["race"] / seconds["exact"], 4),
    }
