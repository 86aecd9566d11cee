"""Charts of how sure a choice of layers is: under other probe items, another corpus, another method. They read scores.json's analysis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import BLUE, GREY, VERMILION, WIDTH, finite, over_depth, style
from adept_fast.report.results import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stability(scores: Mapping[str, Any]) -> Figure | None:
    """Draw how often each layer would be chosen from a random probe, one panel a probe size; the chosen layers are orange."""
    from matplotlib.figure import Figure

    found = (scores.get("analysis") or {}).get("stability")
    if not found:
        return None
    sizes = found["sizes"]
    with style():
        figure = Figure(figsize=(WIDTH, 0.7 + 1.3 * len(sizes)), layout="constrained")
        figure.set_label("How often each layer would be chosen")
        panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
        for entry, axes in zip(sizes, panels, strict=True):
            layers = len(entry["frequency"])
            colours = [VERMILION if layer in found["layers"] else BLUE for layer in range(layers)]
            axes.bar(range(layers), [100 * share for share in entry["frequency"]], color=colours, width=0.8)
            axes.set_ylim(0, 100)
            axes.set_title(f"{entry['items']} items: the same layers in {100 * entry['same']:.0f} % of {found['draws']:,} draws")
            axes.set_ylabel("chosen (%)")
        over_depth(panels[-1], layers)
        return figure


def conflicts(scores: Mapping[str, Any]) -> Figure | None:
    """Draw the rank of each layer for two corpora with its interval; layers whose intervals do not overlap are shaded."""
    from matplotlib.figure import Figure

    found = (scores.get("analysis") or {}).get("conflicts")
    if not found:
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        figure.set_label("Ranks of the layers for two corpora")
        axes = figure.subplots()
        names = [f"general probe ({found['profiles'][0]})", "domain"]
        looks = ((BLUE, "o", -0.15), (GREY, "s", 0.15))
        for profile, name, (colour, marker, shift) in zip(found["profiles"], names, looks, strict=True):
            rank, low, high = np.array(found["ranks"][profile]).T
            bars = np.stack([np.fmax(rank - low, 0), np.fmax(high - rank, 0)])
            axes.errorbar(np.arange(len(rank)) + shift, rank, bars, fmt=marker, color=colour, markersize=4.5, elinewidth=1.2, label=name)
        for layer in found["layers"]:
            axes.axvspan(layer - 0.4, layer + 0.4, color=VERMILION, alpha=0.15, linewidth=0)
        apart = ", ".join(map(str, sorted(found["layers"]))) or "none"
        axes.set_title(f"Ranked apart beyond the intervals: {apart}; Spearman {number(found['spearman'], 2)}", wrap=True)
        axes.set_ylabel("rank (0: least important)")
        over_depth(axes, len(rank))
        figure.legend(loc="outside lower left", ncols=2)
        return figure


def method_comparison(scores: Mapping[str, Any]) -> Figure | None:
    """Draw Spearman's correlation of each pair of methods with its interval, and below it each method's ranks of the layers."""
    from matplotlib.figure import Figure

    found = (scores.get("analysis") or {}).get("comparison")
    if not found:
        return None
    names = found["names"]
    matrix = np.stack([finite(row, len(names)) for row in found["spearman"]])
    with style():
        figure = Figure(figsize=(WIDTH, 2.4 + 0.55 * len(names)), layout="constrained")
        figure.set_label("Rank correlation of the methods")
        upper, lower = figure.subplots(2, 1, height_ratios=(len(names), 3))
        upper.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for row, column in np.ndindex(matrix.shape):
            text = f"{matrix[row, column]:.2f}"
            if row != column:
                text += f"\n[{number(found['low'][row][column], 2)}, {number(found['high'][row][column], 2)}]"
            dark = abs(matrix[row, column]) > 0.6
            upper.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        upper.set_xticks(range(len(names)), names)
        upper.set_yticks(range(len(names)), names)
        upper.grid(visible=False)
        upper.set_title("Spearman over layers, with 95 % interval over items")
        ranks = np.argsort(np.argsort([finite(row, len(row)) for row in found["values"]], axis=1), axis=1)
        lower.imshow(ranks, cmap="viridis", aspect="auto")
        lower.set_yticks(range(len(names)), names)
        lower.grid(visible=False)
        lower.set_title("Rank of each layer (dark: least important)")
        lower.set_xlabel("layer (0 is next to the input)")
        return figure
