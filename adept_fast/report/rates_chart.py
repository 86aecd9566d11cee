"""The chart of unit rates: one panel a module type, because units are ranked within their type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import BLUE, COLOURS, INK, MARKERS, WIDTH, finite, style
from adept_fast.tuning.training_history import Refresh

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIT = re.compile(r"(?:.*?\.)??(?P<layer>\d+)\.(?P<path>[^\[]+)(?:\[(?P<part>[^\]]*)\])?")
COLUMNS = 2


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """Split a unit's name into module type and layer, without head or row:

    "model.layers.4.self_attn.qkv_proj[q,3]" -> ("qkv_proj[q]", 4)
    """
    match = UNIT.fullmatch(name)
    if match is None:
        return name, None
    part = next((piece for piece in (match["part"] or "").split(",") if piece and not piece.isdigit()), "")
    return match["path"].rpartition(".")[2] + (f"[{part}]" if part else ""), int(match["layer"])


def unit_rates(refreshes: Sequence[Refresh]) -> Figure:
    """Draw the learning-rate multiplier of each unit over steps, one panel a module type. refreshes: one or more, each with rates.

    A panel has one line a copied layer where each has one unit of the type, for up to 8 layers; otherwise the median and the 10 to 90 %
    band over the units of the type. A single refresh is drawn as points, one row a type.
    """
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(name for refresh in refreshes for name in refresh.rates))
    steps = [refresh.step for refresh in refreshes]
    rates = np.stack([finite([refresh.rates.get(name) for name in units]) for refresh in refreshes])
    places = [kind_and_layer(name) for name in units]
    kinds = {kind: [index for index, place in enumerate(places) if place[0] == kind] for kind in dict.fromkeys(kind for kind, _ in places)}
    layers = sorted({-1 if layer is None else layer for _, layer in places})
    by_layer = len(set(places)) == len(places) and len(layers) <= len(MARKERS)
    with style():
        once = len(steps) == 1
        rows = 1 if once else -(-len(kinds) // COLUMNS)
        height = 1.3 + 0.3 * len(kinds) if once else max(3.0, 0.8 + 1.6 * rows)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.set_label("Learning-rate multipliers of the units")
        if once:
            _once(figure.subplots(), kinds, rates[0], places, layers, by_layer)
            figure.supxlabel("multiplier of the learning rate")
            panel = figure.axes[0]
        else:
            panels = figure.subplots(rows, min(COLUMNS, len(kinds)), sharex=True, sharey=True, squeeze=False).flatten()
            for axes, (kind, members) in zip(panels, kinds.items(), strict=False):
                axes.set_title(kind)
                axes.axhline(1, color=INK, linewidth=0.8)
                _over_steps(axes, steps, rates[:, members], [places[index][1] for index in members], layers, by_layer)
            columns = min(COLUMNS, len(kinds))
            for axes in panels[len(kinds) :]:
                axes.set_visible(False)
            for axes in panels[max(0, len(kinds) - columns) : len(kinds)]:
                axes.tick_params(labelbottom=True)
            panels[0].set_ylim(0, max(1.1, 1.1 * np.nanmax(rates, initial=1)))
            panels[0].xaxis.get_major_locator().set_params(integer=True, nbins=3)
            figure.supxlabel("optimizer step")
            figure.supylabel("multiplier of the learning rate")
            panel = max(panels[: len(kinds)], key=lambda axes: len(axes.get_legend_handles_labels()[0]))
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return figure


def _look(layer: int | None, layers: Sequence[int]) -> dict[str, Any]:
    index = layers.index(-1 if layer is None else layer)
    return {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 5, "label": "units" if layer is None else f"layer {layer}"}


def _over_steps(
    axes: Axes, steps: Sequence[int], rates: np.ndarray, owners: Sequence[int | None], layers: Sequence[int], by_layer: bool
) -> None:
    if by_layer:
        for column, layer in enumerate(owners):
            axes.plot(steps, rates[:, column], linewidth=1.2, **_look(layer, layers))
        return
    low, median, high = _band(rates)
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.22, linewidth=0, label="10 to 90 % of units")
    axes.plot(steps, median, color=BLUE, marker="o", markersize=4.5, linewidth=1.4, label="median unit")


def _once(
    axes: Axes,
    kinds: Mapping[str, Sequence[int]],
    rates: np.ndarray,
    places: Sequence[tuple[str, int | None]],
    layers: Sequence[int],
    by_layer: bool,
) -> None:
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.1, 1.1 * np.nanmax(rates, initial=1)))
    rows = list(kinds.values())
    if by_layer:
        for layer in layers:
            owner = None if layer < 0 else layer
            points = [(rates[index], row) for row, members in enumerate(rows) for index in members if places[index][1] == owner]
            axes.plot(*zip(*points, strict=True), linestyle="none", **_look(owner, layers))
        return
    low, median, high = np.array([_band(rates[None, members])[:, 0] for members in rows]).T
    bars = np.stack([median - low, high - median])
    axes.errorbar(median, range(len(rows)), xerr=bars, fmt="o", color=BLUE, label="median unit, 10 to 90 % of units")


def _band(rates: np.ndarray) -> np.ndarray:
    """Return the 10 %, 50 % and 90 % quantiles over units, [3, steps] from [steps, units]; NaN where a step has no finite rate."""
    present = [row[np.isfinite(row)] for row in rates]
    return np.array([np.quantile(row, (0.1, 0.5, 0.9)) if len(row) else [np.nan] * 3 for row in present]).T
