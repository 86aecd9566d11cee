"""The chart of unit importance: one row a part of a layer, one column a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import WIDTH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def unit_profile(scores: Mapping[str, Any]) -> Figure:
    """Draw the primary importance of each unit as a colour. scores: the content of unit_scores.json.

    Red: the loss rises without the unit. A dot: the interval contains 0. White: the loss without the unit is not finite.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    profile = scores["profiles"][scores["loss"]]
    kinds, layers = list(dict.fromkeys(scores["kinds"])), sorted(set(scores["layers"]))
    grid, doubtful = np.full((len(kinds), len(layers)), np.nan), []
    values = (profile[key] for key in ("values", "low", "high"))
    for layer, kind, value, low, high in zip(scores["layers"], scores["kinds"], *values, strict=True):
        row, column = kinds.index(kind), layers.index(layer)
        grid[row, column] = np.nan if value is None else value
        if low is not None and low <= 0 and (high is None or high >= 0):
            doubtful.append((column, row))
    there = np.abs(grid[np.isfinite(grid)])
    typical = float(np.median(there)) if len(there) else 0.0
    largest = float(there.max(initial=0.0)) or 1.0
    with style():
        figure = Figure(figsize=(WIDTH, 1.3 + 0.24 * len(kinds)), layout="constrained")
        figure.set_label("Importance of the parts of each layer")
        axes = figure.subplots()
        norm = SymLogNorm(max(typical, 1e-6 * largest), vmin=-largest, vmax=largest)
        image = axes.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto")
        if doubtful:
            axes.plot(*zip(*doubtful, strict=True), ".", color="black", markersize=3)
        axes.set_yticks(range(len(kinds)), kinds)
        shown = range(0, len(layers), max(1, len(layers) // 16))
        axes.set_xticks(list(shown), [str(layers[at]) for at in shown])
        axes.grid(visible=False)
        axes.set_xlabel("layer (0 is next to the input)")
        axes.set_title(f"Loss without each part ({scores['loss']}); a dot: the interval holds 0")
        figure.colorbar(image, label="increase (nats/token)")
        return figure
