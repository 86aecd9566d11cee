"""Charts of how sure a choice of layers is: under other probe items, another corpus, another method."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from adept_fast.report.drawing import BLUE, GREY, INK, VERMILION, WIDTH, finite, over_depth, style
from adept_fast.report.numbers import NONE, interval, number
from adept_fast.scoring.scores import LayerScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def stability(scores: LayerScores) -> Figure | None:
    """Draw how often each layer would be chosen from a random probe, one panel a probe size; the chosen layers are orange."""
    from matplotlib.figure import Figure

    found = scores.analysis.get("stability")
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
            axes.set_title(f"{entry['items']} items: {100 * entry['same']:.0f} % of {found['draws']:,} draws choose the same layers")
            axes.set_ylabel("chosen (%)")
            axes.set_yticks((0, 50, 100))
        over_depth(panels[-1], layers)
        return figure


def conflicts(scores: LayerScores) -> Figure | None:
    """Draw the rank of each layer for two corpora with its interval; layers whose intervals do not overlap are shaded."""
    from matplotlib.figure import Figure

    found = scores.analysis.get("conflicts")
    if not found:
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        figure.set_label("Ranks of the layers for two corpora")
        axes = figure.subplots()
        names = [f"general probe ({found['profiles'][0]})", "domain"]
        looks = ((BLUE, "o", -0.15), (GREY, "s", 0.15))
        for profile, name, (colour, marker, shift) in zip(found["profiles"], names, looks, strict=True):
            rank, low, high = np.array(found["ranks"][profile], dtype=np.float64).T
            bars = np.stack([np.fmax(rank - low, 0), np.fmax(high - rank, 0)])
            size = 4.5 if len(rank) <= 40 else 2.5
            places = np.arange(len(rank)) + shift
            axes.errorbar(places, rank, bars, fmt=marker, color=colour, markersize=size, elinewidth=1.2, label=name)
        for layer in found["layers"]:
            axes.axvspan(layer - 0.4, layer + 0.4, color=VERMILION, alpha=0.15, linewidth=0)
        apart = ", ".join(map(str, sorted(found["layers"]))) or "none"
        lines = textwrap.wrap(f"Ranked apart beyond the intervals: {apart}", 52)
        axes.set_title("\n".join([*lines, f"Rank correlation (Spearman) {number(found['spearman'], 2)}"]))
        axes.set_ylabel("rank (0: least important)")
        over_depth(axes, len(rank))
        figure.legend(loc="outside lower left", ncols=2)
        return figure


def method_comparison(scores: LayerScores) -> Figure | None:
    """Draw Spearman's correlation of each pair of methods with its interval, and below it each method's ranks of the layers."""
    from matplotlib.figure import Figure

    found = scores.analysis.get("comparison")
    if not found:
        return None
    names = found["names"]
    matrix, low, high = (np.array(found[key], dtype=np.float64) for key in ("spearman", "low", "high"))
    ranks = np.argsort(np.argsort([finite(row) for row in found["values"]], axis=1), axis=1)
    with style():
        figure = Figure(figsize=(WIDTH, 2.6 + 0.9 * len(names)), layout="constrained")
        figure.set_label("Rank correlation of the methods")
        upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
        _cells(upper, matrix, "RdBu", -1, 1)
        for row, column in np.ndindex(*matrix.shape):
            value = float(matrix[row, column])
            if not np.isfinite(value):
                upper.text(column, row, NONE, ha="center", va="center", color=INK)
                continue
            bounds = interval(float(low[row, column]), float(high[row, column]), 2)
            text = number(value, 2) + (f"\n{bounds}" if row != column else "")
            shade = "#fefefe" if abs(value) > 0.6 else "#010101"  # black and white on paper of any colour
            upper.text(column, row, text.replace(" ", "\n") if len(names) > 3 else text, ha="center", va="center", color=shade)
        upper.set_xticks(range(len(names)), names, rotation=20 if len(names) > 2 else 0)
        upper.set_yticks(range(len(names)), names)
        upper.set_title("Spearman's rank correlation over layers\n(in brackets: 95 % interval over items)")
        _cells(lower, ranks, "viridis", 0, max(1, ranks.max()))
        lower.set_yticks(range(len(names)), names)
        lower.set_title("Rank of each layer (dark: least important)")
        over_depth(lower, ranks.shape[1])
        return figure


def _cells(axes: Axes, values: np.ndarray, colours: str, low: float, high: float) -> None:
    """Draw a table of values as colours, the first row at the top. It is drawn as shapes: a bitmap would blur."""
    places = (np.arange(length + 1) - 0.5 for length in values.shape[::-1])
    axes.pcolormesh(*places, np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    axes.grid(visible=False)
