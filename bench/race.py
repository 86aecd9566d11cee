"""The race for the k lowest layers against the exact sweep of the same items, their packs in turn in one process.

    python -m bench race --model SMOLLM2 --probe PROBE --into FILE --seconds 240

Run again until it prints the result: what each pack took and gave is kept in FILE. Regret is measured: the exact importances of the raced
choice, summed, minus those of the exact one. Without --model a random model of SmolLM2-135M's shape and random items stand in.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adept_fast.allocator import freed_memory_kept
from adept_fast.families import decoder_layers
from adept_fast.importance import masking
from adept_fast.importance.packs import Pack, pack
from adept_fast.importance.race import Race, run
from adept_fast.importance.sweep import plan
from bench.scoring import inputs


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench race", description=__doc__)
    parser.add_argument("--model", help="a checkpoint folder or hub name")
    parser.add_argument("--probe", default="general", help="a probe file, with --model")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--items", type=int, default=10**6)
    parser.add_argument("--longest", type=int, default=320, help="take the items that fit so many tokens")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--regret", type=float, default=0.04)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--into", type=Path, required=True)
    given = parser.parse_args(argv)
    model, items = inputs(given)
    items = [item for item in items if len(item.input_ids) <= given.longest]
    planned, layers = plan(model, items), len(decoder_layers(model))
    tokens = torch.tensor([item.supervised for item in items], dtype=torch.float64)
    kept: dict[str, Any] = json.loads(given.into.read_text()) if given.into.exists() else {}
    seconds, end = {"race": 0.0, "exact": 0.0}, time.monotonic() + given.seconds

    def measured(way: str, part: Pack, without: Sequence[int]) -> Tensor:
        """Loss differences of the items of a pack, fp64 [items, layers]."""
        key = json.dumps([way, part.items, list(without)])
        if key not in kept:
            if time.monotonic() > end:
                raise SystemExit(f"{sum(seconds.values()):.0f} s measured so far: run the same command again")
            start = time.perf_counter()
            losses = masking.measure(model, part, without, ["answer"], planned)["answer"]
            kept[key] = [time.perf_counter() - start, (losses[:, 1:] - losses[:, :1]).tolist()]
            given.into.write_text(json.dumps(kept))
        seconds[way] += kept[key][0]
        differences = torch.full((len(part.items), layers), torch.nan, dtype=torch.float64)
        differences[:, list(without)] = torch.tensor(kept[key][1], dtype=torch.float64)
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
        masking.measure(model, waiting[0], range(0, layers, 8), ["answer"], planned)  # warm-up
        outcome = run(race, tokens, layers, measure, given.seed)
        while waiting:
            next_exact()
    values = exact.sum(0) / tokens.sum()
    best = values.argsort()[: given.k]
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "model": Path(given.model).name if given.model else "random, SmolLM2-135M's shape",
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
