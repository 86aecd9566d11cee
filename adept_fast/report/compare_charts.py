"""Charts that compare recipes: what each gained and lost against the base, and its way there over training."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import COLOURS, GREY, INK, LEAST, MARKERS, WIDTH, finite, least_span, style
from adept_fast.report.evaluated_runs import EvaluatedRun, Group

FRONT = "Pareto front"
LABEL = 48  # characters that fit on a line of the legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trade_off(groups: Sequence[Group], front: Sequence[Group]) -> Figure:
    """Draw the change of general loss against that of domain loss: recipes with intervals, their seeds, and the front."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 4.2 + 0.2 * len(groups)), layout="constrained")
        figure.set_label("Change of general loss against change of domain loss")
        axes = figure.subplots()
        places = np.array([group.place for group in front])
        for index, group in enumerate(groups):
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            domain, general = (group.against_base[corpus].loss for corpus in ("domain", "general"))
            if len(group.runs) > 1:
                seeds = np.array([Group(group.name, (run,)).place for run in group.runs])
                axes.plot(*seeds.T, linestyle="none", markersize=4, alpha=0.5, **look)
            bars = [[[change.value - change.low], [change.high - change.value]] for change in (domain, general)]
            axes.errorbar(domain.value, general.value, bars[1], bars[0], markersize=7, label=fill(group.name, LABEL), **look)
        if len(front) > 1:  # drawn as the border of what is no better than a recipe in either
            axes.step(*places.T, where="post", color=GREY, linestyle="--", linewidth=1, label=FRONT, zorder=1)
        _from_base(axes)
        axes.set_xlabel("domain loss, change from the base\n(left: learnt more)")
        axes.set_ylabel("general loss, change from the base\n(down: kept more)")
        _legend(figure)
        return figure


def trajectories(groups: Sequence[Group]) -> Figure | None:
    """Draw both losses over training as a line a run, from the start; None where no run measured them twice."""
    from matplotlib.figure import Figure

    lines = [(group, [line for run in group.runs if (line := _line(run)) is not None]) for group in groups]
    if not any(found for _, found in lines):
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 4 + 0.2 * len(groups)), layout="constrained")
        figure.set_label("General against domain loss over training")
        axes = figure.subplots()
        for index, (group, found) in enumerate(lines):
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            for number, line in enumerate(found):
                axes.plot(*line, linewidth=1.4, markersize=4, label=None if number else fill(group.name, LABEL), **look)
                axes.plot(*line[:, -1:], markersize=8, **look)
        _from_base(axes)
        axes.set_xlabel("domain loss, change from the start")
        axes.set_ylabel("general loss, change from the start")
        _legend(figure)
        return figure


def _line(run: EvaluatedRun) -> np.ndarray | None:
    """Return domain and general loss minus their first values, [2, measurements]; None with fewer than two of both."""
    curves = [run.history.monitored.get(corpus) for corpus in ("domain", "general")]
    if None in curves or len({curve.steps for curve in curves if curve is not None}) > 1:
        return None
    line = np.stack([finite(curve.values) for curve in curves if curve is not None])
    line = line[:, np.isfinite(line).all(0)]
    return line - line[:, :1] if line.shape[1] > 1 else None


def _legend(figure: Figure) -> None:
    """Put the legend above: the recipes in their order, then the base and the front."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda at: labels[at] in ("base", FRONT))
    figure.legend([handles[at] for at in order], [labels[at] for at in order], loc="outside upper left", ncols=1)


def _from_base(axes: Axes) -> None:
    """Mark the base at 0, and keep both axes long enough for a difference to look as large as it is."""
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.plot(0, 0, marker="*", markersize=12, color=GREY, linestyle="none", label="base")
    axes.margins(0.1)
    least_span(LEAST, axes.xaxis, axes.yaxis)
    axes.locator_params(nbins=5)
