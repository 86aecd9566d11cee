"""Select the layers to copy: the k of lowest importance, under a rule of placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.scoring.budget import check_budget, within
from adept_fast.scoring.scores import LayerScores, require_scores
from adept_fast.scoring.settings import Selection
from adept_fast.settings.validation import Range, check, require


def check_choice(layers: int, k: int, placement: str) -> None:
    """Raise InputError for an unknown placement, or a k outside 1 to `layers`."""
    check(Selection, placement=placement)
    require("k", k, int, Range(1, layers, why="the number of layers to choose from"))


def select_layers(
    scores: LayerScores, k: int | None = None, placement: str = Selection.placement, budget: Mapping[str, float] | None = None
) -> list[int]:
    """Select the layers to copy, among those that are not copies themselves.

    Args:
        scores: a result of `score_layers`; from a race, only the layers that it has proven can be selected
        k: number of layers; 4 by default
        placement: the rule
            lowest: the k lowest scores
            uniform: the last layer of each of k equal depth bands (LLaMA Pro); scores do not matter
            lowest_per_band: the lowest score in each of k equal depth bands
        budget: instead of k, shares of full training, {"parameters": 0.15} or {"time": 0.5} or both: as many layers as fit (budget.py)

    Returns:
        list[int]: layer indices, ascending

    Raises:
        InputError: k is out of range, the scores are from a race for another choice, or the budget allows no copy

    >>> scores = score_layers(model, probe)
    >>> select_layers(scores, k=2, placement="uniform"), len(select_layers(scores, k=3))
    ([1, 3], 3)

    Source: ADEPT (arXiv 2510.10071), stage 1; uniform: LLaMA Pro (arXiv 2401.02415).
    """
    require_scores(scores)
    candidates = scores.candidates
    if budget is not None:
        if k is not None or scores.certificate or scores.costs is None:
            raise InputError("a budget chooses k itself, from scores with costs and without a race: give no k, and score without one")
        check_budget(budget, scores.costs, candidates)
        return within(budget, scores.costs, [select_layers(scores, 1 + more, placement) for more in range(len(candidates))])
    k = Selection.k if k is None else k
    check_choice(len(candidates), k, placement)
    if scores.certificate and placement != "uniform":
        if (k, placement) != (scores.certificate["k"], "lowest"):
            raced = scores.certificate["k"]
            raise InputError(f"the scores are those of a race for the {raced} lowest layers: score without a race for another choice")
        return list(scores.certificate["layers"])
    return by_placement(torch.tensor([scores.values], dtype=torch.float64), candidates, k, placement)[0].tolist()


def by_placement(values: Tensor, candidates: Sequence[int], k: int, placement: str) -> Tensor:
    """Select k of `candidates` by each row of values [n, layers]: int64 [n, k], ascending."""
    if placement == "uniform":
        return torch.tensor([evenly(candidates, k)]).expand(len(values), -1)
    values, layers, count = values[:, candidates], torch.tensor(candidates), len(candidates)
    if placement == "lowest":
        return layers[values.argsort(dim=1, stable=True)[:, :k].sort(1).values]
    bands = [slice(band * count // k, (band + 1) * count // k) for band in range(k)]
    return torch.stack([layers[band][values[:, band].argmin(1)] for band in bands], 1)


def evenly(candidates: Sequence[int], k: int) -> list[int]:
    """Return the last of each of k equal depth bands of `candidates`."""
    return [candidates[(band + 1) * len(candidates) // k - 1] for band in range(k)]


def next_layer(scores: LayerScores, chosen: Sequence[int], placement: str = "lowest") -> dict[str, Any] | None:
    """Describe the choice of one more layer; None if all candidates are chosen, or the costs are unknown.

    Returns a dict with
        layers: the choice of k + 1
        joins, scores: its new layers and their scores
        shares: what its copies cost, as shares of full training
    """
    if scores.costs is None or scores.certificate or len(chosen) >= len(scores.candidates):
        return None
    layers = select_layers(scores, len(chosen) + 1, placement)
    joins = [layer for layer in layers if layer not in chosen]
    return {"layers": layers, "joins": joins, "scores": [scores.values[layer] for layer in joins], "shares": scores.costs.shares(layers)}


def undecided(scores: LayerScores, chosen: Sequence[int], placement: str = "lowest") -> list[int]:
    """Return the candidates that were not chosen, but whose interval reaches below the highest interval of a chosen layer."""
    if placement != "lowest":
        return []
    others = [layer for layer in scores.candidates if layer not in chosen]
    if scores.certificate:
        return [layer for layer in others if layer in scores.certificate["undecided"]]
    limit = max(scores.high[layer] for layer in chosen)
    return [layer for layer in others if scores.low[layer] < limit]
