"""Bootstrap intervals over items: items, not tokens, are what was sampled."""

from __future__ import annotations

import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000


def bootstrap(sums: Tensor, weights: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean sum(sums) / sum(weights) over items, and its 95 % percentile interval from 2,000 resamples of whole items.

    sums: [items, ...] in any unit; weights: [items], say supervised tokens. Returns value, low, high, each of shape [...], fp64.
    """
    flat, weights = sums.double().flatten(1) if sums.ndim > 1 else sums.double()[:, None], weights.double()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(weights), (RESAMPLES, len(weights)), generator=generator)
    counts = torch.zeros(RESAMPLES, len(weights), dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64))
    means = (counts @ flat) / (counts @ weights)[:, None]
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    shape = sums.shape[1:]
    return (flat.sum(0) / weights.sum()).reshape(shape), low.reshape(shape), high.reshape(shape)
