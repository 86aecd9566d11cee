"""How sure a choice of layers is, from the scores of single items: against the size and sampling of the probe, against another corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.runtime.bootstrap import CONFIDENCE, resampled
from adept_fast.scoring.scores import STATISTICS, LayerScores, require_scores
from adept_fast.scoring.select_layers import by_placement, check_choice

SIZES = (16, 64)
DRAWS = 1000


def complete(scores: LayerScores, profile: str) -> Tensor:
    """Which items all layers were measured on, bool [items]: all, or of a race those before it dropped a layer, a random part.

    Raises InputError where the scores of single items are lacking.
    """
    require_scores(scores)
    found = scores.per_item.get(profile)
    if found is None:
        raise InputError(f"profile {profile!r}: the scores of every item are needed: keep scores.items.safetensors")
    return (~found.sums.flatten(2).isnan()).any(2).all(1) if found.sums.ndim > 2 else ~found.sums.isnan().any(1)


def resampled_values(
    scores: LayerScores, profile: str, items: int | None = None, draws: int = DRAWS, seed: int = 0, among: Tensor | None = None
) -> Tensor:
    """Values of a profile, fp64 [draws, layers], on random corpora of `items` items (none: as many as there are), drawn with replacement
    from the complete ones, or from `among`, bool [items]. Raises InputError where the losses of single items are lacking."""
    found = scores.per_item[profile].among(complete(scores, profile) if among is None else among)
    means = resampled(found.sums, found.weights, seed, items, draws)
    statistic = STATISTICS.get(scores.method)
    return statistic(means) if statistic else means


def selection_stability(
    scores: LayerScores, layers: Sequence[int], placement: str = "lowest", sizes: Sequence[int | None] = (*SIZES, None), seed: int = 0
) -> dict[str, Any]:
    """How often each layer would be chosen, and these same `layers` exactly, had the probe been other items of the same kind.

    Of a race this speaks of probes as large as the part of it that all layers were measured on; its certificate speaks of the whole probe.
    {"layers", "placement", "draws", "sizes": [{"items", "same": share of draws, "frequency": share of draws [layers]}]}. sizes: items of
    the random corpora, None for all there are; those that are not below the number of items are left out.
    """
    require_scores(scores)
    candidates, k = scores.candidates, len(layers)
    check_choice(len(candidates), k, placement)
    available = int(complete(scores, scores.loss).sum())
    chosen = torch.zeros(len(scores.values), dtype=torch.bool)
    chosen[list(layers)] = True
    entries = []
    for size in dict.fromkeys(size for size in sizes if size is None or size < available):
        values = resampled_values(scores, scores.loss, size, seed=seed)
        picked = torch.zeros(values.shape, dtype=torch.bool).scatter_(1, by_placement(values, candidates, k, placement), True)
        same = (picked == chosen).all(1).double().mean()
        entries.append({"items": size or available, "same": float(same), "frequency": picked.double().mean(0).tolist()})
    return {"layers": list(layers), "placement": placement, "draws": DRAWS, "sizes": entries}


def ranks(values: Tensor) -> Tensor:
    """[n, layers] -> rank of each layer among its row's, fp64, the lowest 0; ties keep their order."""
    return values.argsort(dim=1, stable=True).argsort(dim=1).double()


def corpus_conflicts(scores: LayerScores, first: str, second: str, seed: int = 0) -> dict[str, Any]:
    """Layers that two corpora, as profiles of `scores`, rank apart: the 95 % bootstrap intervals of their two ranks do not meet.

    {"profiles", "ranks": {profile: [[rank, low, high] a layer]}, "spearman", "layers": those apart, the widest first}. Rank 0 is lowest.
    """
    require_scores(scores)
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for number, name in enumerate((first, second)):
        drawn = ranks(resampled_values(scores, name, seed=seed + number))
        low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        values = scores.per_item[name].among(complete(scores, name)).profile(scores.method).values
        rank = ranks(torch.tensor([values], dtype=torch.float64))[0]
        found[name] = torch.stack([rank, low, high], 1)
    one, two = found[first], found[second]
    apart = (one[:, 1] > two[:, 2]) | (two[:, 1] > one[:, 2])
    distance = (one[:, 0] - two[:, 0]).abs()
    layers = sorted(apart.nonzero()[:, 0].tolist(), key=lambda layer: -float(distance[layer]))
    return {
        "profiles": [first, second],
        "ranks": {name: values.tolist() for name, values in found.items()},
        "spearman": float(torch.corrcoef(torch.stack([one[:, 0], two[:, 0]]))[0, 1]),
        "layers": layers,
    }
