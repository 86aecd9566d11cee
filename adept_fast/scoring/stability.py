"""Measure how certain a choice of layers is, from the scores of single items: under other probes, and against another corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import layer_indices
from adept_fast.runtime.bootstrap import TAILS, resampled
from adept_fast.scoring.scores import STATISTICS, LayerScores, require_scores
from adept_fast.scoring.select_layers import by_placement, check_choice
from adept_fast.scoring.settings import Score
from adept_fast.settings.validation import COUNT, check, require, require_made

SIZES = (16, 64)
DRAWS = 1000


def complete(scores: LayerScores, profile: str) -> Tensor:
    """Mark the items on which all layers were measured, bool [items]: all, or the random part that a race measured before dropping a layer.

    Raises InputError if the scores of single items are missing.
    """
    require_scores(scores)
    found = scores.per_item.get(profile)
    if found is None:
        raise InputError(f"profile {profile!r}: the scores of every item are needed: keep scores.items.safetensors")
    return (~found.sums.flatten(2).isnan()).any(2).all(1) if found.sums.ndim > 2 else ~found.sums.isnan().any(1)


def resampled_values(
    scores: LayerScores, profile: str, items: int | None = None, draws: int = DRAWS, seed: int = 0, among: Tensor | None = None
) -> Tensor:
    """Compute the values of a profile on random corpora, fp64 [draws, layers].

    items: size of each corpus; None: as many as there are, drawn with replacement
    among: items to draw from, bool [items]; None: those of `complete`

    Raises InputError if the scores of single items are missing.
    """
    among = complete(scores, profile) if among is None else among
    found = scores.per_item[profile].among(among)
    means = resampled(found.sums, found.weights, seed, items, draws)
    statistic = STATISTICS.get(scores.method)
    return statistic(means) if statistic else means


def selection_stability(
    scores: LayerScores, layers: Sequence[int], placement: str = "lowest", sizes: Sequence[int | None] = (*SIZES, None), seed: int = 0
) -> dict[str, Any]:
    """Estimate how often each layer, and exactly this choice, would be selected with another probe of the same kind.

    For scores of a race this refers to the items on which all layers were measured; its certificate refers to the whole probe.

    Args:
        scores: a result of `score_layers`, with per_item
        layers: the choice to test
        placement: the rule by which it was selected
        sizes: items of each random probe, drawn with replacement; None: all. Sizes not below the number of items are skipped
        seed: of the draws

    Returns:
        dict with layers, placement, draws, and sizes, a list of dicts with
            items: size of the probes
            same: share of draws that select exactly `layers`
            frequency: share of draws that select each layer, [layers]

    Raises:
        InputError: the scores of single items are missing

    >>> scores = score_layers(model, probe)
    >>> stability = selection_stability(scores, select_layers(scores, k=1), sizes=(4, None))
    >>> [entry["items"] for entry in stability["sizes"]]
    [4, 12]

    Source: bootstrap over items as in runtime/bootstrap.py.
    """
    require_scores(scores)
    check(Score, seed=seed)
    require_made("sizes", sizes, Sequence, "give numbers of items, None for as many as there are")
    for index, size in enumerate(sizes):
        if size is not None:
            require(f"sizes[{index}]", size, int, COUNT)
    layer_indices(layers, len(scores.values))
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
    """Rank the layers of each row, the lowest 0, ties in their order: [n, layers] -> fp64 [n, layers]."""
    return values.argsort(dim=1, stable=True).argsort(dim=1).double()


def corpus_conflicts(scores: LayerScores, first: str, second: str, seed: int = 0) -> dict[str, Any]:
    """Find the layers that two corpora rank differently: the 95 % bootstrap intervals of their ranks do not overlap.

    Args:
        scores: a result of `score_layers` with both corpora as profiles, "answer" and "domain" for example, and with per_item
        first, second: names of the two profiles
        seed: of the bootstrap

    Returns:
        dict with
            profiles: [first, second]
            ranks: profile -> [rank, low, high] of each layer; rank 0 is the lowest score
            spearman: rank correlation of the two profiles
            layers: those ranked differently, the largest difference first

    Raises:
        InputError: the scores of single items of a profile are missing

    >>> corpus_conflicts(score_layers(model, probe, losses=["all"]), "answer", "all")["profiles"]
    ['answer', 'all']

    Source: bootstrap over items as in runtime/bootstrap.py.
    """
    require_scores(scores)
    check(Score, seed=seed)
    for name, value in {"first": first, "second": second}.items():
        require(name, value, str)
    found = {}
    for number, name in enumerate((first, second)):
        drawn = ranks(resampled_values(scores, name, seed=seed + number))
        low, high = torch.quantile(drawn, TAILS, dim=0)
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
