"""The chart of unit importance: one row a part of a layer, one column a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from adept_fast.report.drawing import WIDTH, style, whole_numbers
from adept_fast.scoring.scores import UnitScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def unit_profile(scores: UnitScores) -> Figure:
    """Draw the primary importance of each unit as a colour.

    Red: the loss rises without the unit. A dot: the interval contains 0. No colour: the loss without the unit is not finite, or the layer
    was not scored.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(scores.kinds))
    first, last = min(scores.layers), max(scores.layers)
    grid, doubtful = np.full((len(kinds), last - first + 1), np.nan), []
    for layer, kind, value, low, high in zip(scores.layers, scores.kinds, scores.values, scores.low, scores.high, strict=True):
        row = kinds.index(kind)
        grid[row, layer - first] = value if math.isfinite(value) else math.nan
        if low <= 0 <= high:
            doubtful.append((layer, row))
    there = np.abs(grid[np.isfinite(grid)])
    largest = float(there.max(initial=0.0)) or 1.0
    threshold = max(float(np.median(there)) if len(there) else 0.0, 1e-6 * largest)
    with style():
        figure = Figure(figsize=(WIDTH, 1.9 + 0.26 * len(kinds)), layout="constrained")
        figure.set_label("Importance of the parts of each layer")
        axes = figure.subplots()
        edges = np.arange(first, last + 2) - 0.5, np.arange(len(kinds) + 1) - 0.5
        norm = SymLogNorm(threshold, vmin=-largest, vmax=largest)
        cells = axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="RdBu_r", norm=norm, edgecolors="face", linewidth=0.3)
        if doubtful:
            axes.plot(*zip(*doubtful, strict=True), ".", color="#010101", markersize=3)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.grid(visible=False)
        whole_numbers(axes, "layer (0 is next to the input)")
        axes.set_title(f"Loss without each part ({scores.loss})\n(a dot: the interval holds 0)")
        bar = figure.colorbar(cells, location="bottom", label="increase (nats/token)", aspect=40)
        steps = [threshold * 10.0**power for power in range(1 + max(0, math.floor(math.log10(largest / threshold))))][-3:]
        ticks = [-step for step in reversed(steps)] + [0.0] + steps
        bar.set_ticks(ticks, labels=[f"{tick:.1g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
        bar.set_ticks([], minor=True)
        return figure
