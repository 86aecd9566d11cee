"""The chart of forgetting: the rise of general loss over training, measured and predicted, and the predictions by module type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import BLUE, COLOURS, GREY, INK, MARKERS, VERMILION, WIDTH, finite, least_span, style, whole_numbers
from adept_fast.report.rates_chart import kind_and_layer
from adept_fast.tuning.training_history import MeterReading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.005  # nats per token: the shortest axis of a rise


def forgetting(readings: Sequence[MeterReading]) -> Figure:
    """Draw the measured rise of general loss and its summed predictions (above), and the predictions by module type (below).

    The title states the sum of the predictions' bounds.
    """
    from matplotlib.figure import Figure

    steps = [reading.step for reading in readings]
    units = list(dict.fromkeys(name for reading in readings for name in reading.predicted))
    predicted = np.nan_to_num([finite([reading.predicted.get(name) for name in units]) for reading in readings]).cumsum(0)
    bound = np.nan_to_num([value for reading in readings for value in reading.bound.values()]).sum()
    kinds = [kind_and_layer(name)[0] for name in units]
    with style():
        figure = Figure(figsize=(WIDTH, 5.4 if units else 3), layout="constrained")
        figure.set_label("Rise of general loss, measured and predicted")
        panels = figure.subplots(1 + bool(units), 1, sharex=True, squeeze=False)[:, 0]
        measured = finite([reading.rise for reading in readings])
        panels[0].plot(steps, measured, color=BLUE, marker="o", markersize=5, linewidth=1.6, label="measured")
        panels[0].set_title("Rise of general loss since the start")
        if units:
            look: dict[str, Any] = {"color": VERMILION, "marker": "s", "label": "predicted to first order"}
            panels[0].plot(steps, predicted.sum(1), markersize=5, linewidth=1.6, **look)
            panels[0].set_title(f"Rise of general loss since the start\n(the predictions' bounds add up to {bound:.3g})")
            for index, kind in enumerate(dict.fromkeys(kinds)):
                members = [place for place, other in enumerate(kinds) if other == kind]
                look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}
                panels[1].plot(steps, predicted[:, members].sum(1), linewidth=1.2, markersize=4.5, label=kind, **look)
            panels[1].set_title("Predicted, by module type")
            figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        for axes in panels:
            axes.axhline(0, color=INK if axes is panels[0] else GREY, linewidth=0.8)
            axes.set_ylabel("rise (nats/token)")
            axes.margins(y=0.15)
            least_span(LEAST, axes.yaxis)
        whole_numbers(panels[-1], "optimizer step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return figure
