"""Bootstrap confidence intervals. Items are resampled, not tokens, because tokens of an item are dependent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CONFIDENCE = 0.95
TAILS = torch.tensor([(1 - CONFIDENCE) / 2, 1 - (1 - CONFIDENCE) / 2], dtype=torch.float64)
RESAMPLES = 2000
LARGE = 1e200  # in place of inf


def resampled(sums: Tensor, weights: Tensor, seed: int = 0, items: int | None = None, resamples: int = RESAMPLES) -> Tensor:
    """Return weighted means sum(sums) / sum(weights) of resamples of `items` items (None: all), fp64 [resamples, ...]."""
    draws = torch.randint(len(weights), (resamples, items or len(weights)), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, len(weights), dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64))
    return _means(counts, sums, weights)


def _means(counts: Tensor, sums: Tensor, weights: Tensor) -> Tensor:
    flat, weights = sums.double().reshape(len(weights), -1), weights.double()[:, None]
    measured, endless = ~flat.isnan(), flat.isinf()
    means = (counts @ flat.nan_to_num(posinf=0.0)) / (counts @ (weights * measured))
    if bool(endless.any()):
        means = means.where(counts @ endless.double() == 0, torch.inf)
    return means.reshape(len(means), *(sums.shape[1:] or (1,)))


def bootstrap(
    sums: Tensor, weights: Tensor, seed: int = 0, statistic: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the weighted mean sum(sums) / sum(weights) over items, and its 95 % percentile interval from 2,000 resamples of items.

    sums: [items, ...], in any unit. NaN: not measured; the item counts in neither sum. inf makes the means that it is in inf.
    weights: [items], for example numbers of supervised tokens.
    statistic: function of means [n, ...] that returns [n, ...]; None: the means themselves.

    Returns value, low, high: fp64, of the shape of one item (0-d for sums [items]).
    """
    statistic = statistic or (lambda means: means)
    value = statistic(_means(torch.ones(1, len(weights), dtype=torch.float64), sums, weights))[0]
    found = statistic(resampled(sums, weights, seed))
    endless = found.isinf()
    low, high = torch.nanquantile(found.where(~endless, LARGE), TAILS, dim=0)
    if bool(endless.any()):  # torch interpolates between inf and inf to NaN
        low, high = (bound.where(bound < LARGE / 1e100, torch.inf) for bound in (low, high))
    return (value, low, high) if sums.ndim > 1 else (value[0], low[0], high[0])
