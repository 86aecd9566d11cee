"""Charts of layer importance over depth and of losses over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.report.drawing import (
    BLUE,
    COLOURS,
    EMBER,
    GREY,
    INK,
    LEAST,
    MARKERS,
    VERMILION,
    WIDTH,
    finite,
    least_span,
    over_depth,
    style,
    whole_numbers,
)
from adept_fast.scoring.scores import LayerScores, Profile
from adept_fast.tuning.training_history import Curve, TrainingHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILES = {
    "answer": ("Answer loss", "increase (nats/token)"),
    "all": ("Loss on all tokens", "increase (nats/token)"),
    "domain": ("Loss on the domain", "increase (nats/token)"),
    "kl": ("KL(base || without the layer)", "KL (nats/token)"),
}
METHODS = {
    "gate": ("Gate gradient", "estimated increase (nats/token)"),
    "cumulative": ("Sum of |weight x gradient|", "share of the largest"),
    "rank": ("Mean rank over kinds of module", "1 - rank / layers"),
    "fisher": ("Fisher information", "sum of squared gradients"),
    "block_influence": ("Block influence", "1 - cosine of input and output"),
}


def measure_of(scores: LayerScores) -> str:
    """Name the primary measure of scores and its unit."""
    if scores.method in METHODS:
        return f"{scores.method}, {METHODS[scores.method][1]}"
    return f"{scores.loss}, nats per token lost without each"


def layer_profile(scores: LayerScores, chosen: Sequence[int]) -> Figure:
    """Draw the importance of each layer over depth with its interval, one panel a profile, the primary one first.

    chosen: layers to mark. Where a few layers are far above the rest, the axis is linear up to a threshold and logarithmic above, and the
    panel says so. A layer whose importance is not finite is left out.
    """
    from matplotlib.figure import Figure

    names = sorted(scores.profiles, key=lambda name: name != scores.loss)
    with style():
        figure = Figure(figsize=(WIDTH, 0.8 + 2.3 * len(names)), layout="constrained")
        figure.set_label("Importance of each layer over depth")
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for name, axes in zip(names, panels, strict=True):
            title, unit = METHODS.get(scores.method, PROFILES.get(name, (name, "nats/token")))
            if name == "domain" and scores.method in METHODS:
                title += ", on the domain"
            base = scores.profiles[name].base_loss
            title += ", primary" if name == scores.loss and len(names) > 1 else ""
            title += f"; base {base:.3f}" if base is not None else ""
            _profile(axes, scores.profiles[name], set(chosen), title, unit)
        over_depth(panels[-1], len(scores.values))
        handles, labels = panels[0].get_legend_handles_labels()
        shown = [label.format(100 * scores.confidence) for label in labels]
        figure.legend(handles, shown, loc="outside upper left", ncols=2)
        return figure


def _profile(axes: Axes, profile: Profile, chosen: set[int], title: str, unit: str) -> None:
    values, low, high = map(finite, (profile.values, profile.low, profile.high))
    layers = len(values)
    bars = np.stack([np.fmax(values - low, 0), np.fmax(high - values, 0)])
    bars[:, np.isnan(low) | np.isnan(high)] = math.nan
    marked = np.isin(np.arange(layers), list(chosen))
    small = 1.0 if layers <= 40 else 0.7
    axes.axhline(0, color=INK, linewidth=0.8)
    groups = ((~marked, "o", BLUE, 4.5, "layer, with {:.0f} % interval"), (marked, "D", VERMILION, 6, "chosen: copied"))
    for group, marker, colour, size, label in groups:
        if group.any():
            look: dict[str, Any] = {"color": colour, "markersize": small * size, "elinewidth": 1.2, "label": label}
            axes.errorbar(np.flatnonzero(group), values[group], bars[:, group], fmt=marker, **look)
    places: list[int] = np.flatnonzero(marked & np.isfinite(values)).tolist()
    for layer in places:
        axes.axvspan(layer - 0.4, layer + 0.4, color=VERMILION, alpha=0.12, linewidth=0)
    last = -math.inf
    for layer in places:  # a number only where it does not touch the last one
        if layer - last >= layers / 18:
            last = layer
            axes.text(layer, 0.99, str(layer), transform=axes.get_xaxis_transform(), ha="center", va="top", color=EMBER)
    threshold = _scale(axes, np.concatenate([values, low, high]), values)
    axes.set_title(title + (f"\n(linear up to {threshold:g}, logarithmic above)" if threshold else ""))
    axes.set_ylabel(unit)


def _scale(axes: Axes, drawn: np.ndarray, values: np.ndarray) -> float | None:
    """Use a log scale above a round threshold if a value exceeds 5 times the 75th percentile. Return the threshold, or None."""
    drawn, values = drawn[np.isfinite(drawn)], np.abs(values[np.isfinite(values)])
    typical = float(np.quantile(values, 0.75)) if len(values) else 0.0
    if typical <= 0 or values.max() <= 5 * typical:
        axes.margins(y=0.15)
        return None
    steps = [base * 10.0**power for power in range(math.floor(math.log10(typical)), 300) for base in (1, 2, 5)]
    threshold = next(step for step in steps if step >= typical)
    top, bottom = drawn.max(), drawn.min()
    decades = math.log10(max(top, -bottom) / threshold)
    if decades <= 0:
        axes.margins(y=0.15)
        return None
    axes.set_yscale("symlog", linthresh=threshold, linscale=max(1.0, decades))
    above = [step for step in steps if threshold < step <= 1.2 * max(top, -bottom)]
    if len(above) > 4:
        above = above[1::2] if len(above) <= 8 else [step for step in above if math.isclose(math.log10(step) % 1, 0, abs_tol=1e-9)]
    ticks = [threshold / 2, threshold, *above]
    ticks = [-tick for tick in ticks if -tick >= bottom] + [0.0] + ticks
    axes.set_yticks(ticks, [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.margins(y=0.1)
    return threshold


def losses(history: TrainingHistory) -> Figure:
    """Draw training and held-out domain loss (above) and the other losses measured during training (below) over steps."""
    from matplotlib.figure import Figure

    others = {name: curve for name, curve in history.monitored.items() if name != "domain"}
    with style():
        figure = Figure(figsize=(WIDTH, 4.4 if others else 2.8), layout="constrained")
        figure.set_label("Losses over training")
        panels = figure.subplots(1 + bool(others), 1, sharex=True, height_ratios=(3, 2)[: 1 + bool(others)], squeeze=False)[:, 0]
        _plot(panels[0], history.training, color=GREY, linewidth=0.9, label="training", marker="." if _single(history.training) else None)
        if "domain" in history.monitored:
            _plot(panels[0], history.monitored["domain"], color=VERMILION, marker="s", label="held-out domain")
        panels[0].set_title("Domain")
        for index, (name, curve) in enumerate(others.items(), 1):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index - 1) % len(MARKERS)]}
            _plot(panels[1], curve, label=name, **look)
            panels[1].set_title(", ".join(others).capitalize())
        for axes in panels:
            axes.set_ylabel("nats/token")
            axes.margins(y=0.15)
            least_span(LEAST, axes.yaxis)
        whole_numbers(panels[-1], "optimizer step")
        figure.legend(loc="outside upper left", ncols=3)
        return figure


def _single(curve: Curve) -> bool:
    """Whether a line would not show: no two neighbours are finite."""
    there = np.isfinite(finite(curve.values))
    return not bool((there[1:] & there[:-1]).any())


def _plot(axes: Axes, curve: Curve, **look: Any) -> None:
    axes.plot(curve.steps, finite(curve.values), **{"markersize": 5, "linewidth": 1.6, **look})
