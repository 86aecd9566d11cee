"""The chart of forgetting: the rise of general loss over training, measured and predicted, and the predictions by module type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import BLUE, GREY, VERMILION, WIDTH, finite, style, whole_numbers
from adept_fast.report.rates_chart import kind_and_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forgetting(readings: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the measured rise of general loss and its summed predictions (above), and the predictions by module type (below).

    readings: the "forgetting" lines of trainer_log.jsonl. The title states the sum of the predictions' bounds.
    """
    from matplotlib.figure import Figure

    steps = [reading["step"] for reading in readings]
    measured = finite([reading.get("meter_rise") for reading in readings], len(readings))
    units = list(dict.fromkeys(name for reading in readings for name in reading.get("meter_predicted") or {}))
    predicted, bound = (_summed(readings, key, units) for key in ("meter_predicted", "meter_bound"))
    kinds = [kind_and_layer(name)[0] for name in units]
    with style():
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        figure.set_label("Rise of general loss, measured and predicted")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        upper.axhline(0, color="black", linewidth=0.8)
        upper.plot(steps, measured, color=BLUE, marker="o", markersize=5, linewidth=1.6, label="measured")
        if units:
            upper.plot(steps, predicted.sum(1), color=VERMILION, marker="s", markersize=5, linewidth=1.6, label="first-order prediction")
            upper.set_title(f"General loss against the start; the predictions' bounds add up to {bound[-1].sum():.3g}")
            for kind in dict.fromkeys(kinds):
                members = [index for index, other in enumerate(kinds) if other == kind]
                lower.plot(steps, predicted[:, members].sum(1), linewidth=1.2, marker=".", label=kind)
            lower.legend(loc="upper left", ncols=4, fontsize=8)
        lower.axhline(0, color=GREY, linewidth=0.8)
        lower.set_title("Predicted, by module type")
        for axes in (upper, lower):
            axes.set_ylabel("rise (nats/token)")
            axes.margins(y=0.15)
        upper.legend(loc="upper left")
        whole_numbers(lower, "optimizer step")
        return figure


def _summed(readings: Sequence[Mapping[str, Any]], key: str, units: Sequence[str]) -> np.ndarray:
    """Sum the predictions since the first reading, [readings, units]. A reading without a prediction adds nothing."""
    rows = [finite([(reading.get(key) or {}).get(name) for name in units], len(units)) for reading in readings]
    return np.nan_to_num(np.stack(rows)).cumsum(0)
