"""Importances with their uncertainty, by one loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Importances by one loss.

    values: [layers], nats per supervised token for masking; other methods: see cheap_scores.py
    low, high: bootstrap interval over items, [layers]
    base_loss: of the model as it is, nats per token; None for kl and methods without a baseline

    inf (null in JSON) means that some item has no finite loss without the layer, which therefore ranks above all others.
    """

    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    base_loss: float | None
