"""Charts of layer importance over depth and of losses over training, drawn from scores.json and trainer_log.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adept_fast.errors import InputError
from adept_fast.report.drawing import BLUE, GREY, VERMILION, WIDTH, finite, over_depth, style, whole_numbers

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


def measure_of(scores: Mapping[str, Any]) -> str:
    """Name the primary measure of scores.json and its unit."""
    if scores.get("method") in METHODS:
        return f"{scores['method']}, {METHODS[scores['method']][1]}"
    return f"{scores.get('loss', 'not recorded')}, nats per token lost without each"


def layer_profile(scores: Mapping[str, Any], chosen: Sequence[int]) -> Figure:
    """Draw the importance of each layer over depth with its interval, one panel a profile, the primary one first.

    scores: the content of scores.json. chosen: layers to mark. Where a few layers are far above the rest, the axis is linear up to a
    threshold and logarithmic above, and the panel says so. Raises InputError for scores without profiles.
    """
    from matplotlib.figure import Figure

    profiles = scores.get("profiles") or {}
    if not profiles or not all(profile.get("values") for profile in profiles.values()):
        raise InputError("scores.json: profiles without values: delete it and run adept-fast score again")
    names = sorted(profiles, key=lambda name: name != scores.get("loss"))
    with style():
        figure = Figure(figsize=(WIDTH, 0.6 + 2.4 * len(names)), layout="constrained")
        figure.set_label("Importance of each layer over depth")
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for name, axes in zip(names, panels, strict=True):
            title, unit = METHODS.get(str(scores.get("method")), PROFILES.get(name, (name, "nats/token")))
            if name == "domain" and scores.get("method") in METHODS:
                title += ", on the domain"
            base = profiles[name].get("base_loss")
            title += ", primary" if name == scores.get("loss") else ""
            title += f"; base {base:.3f}" if base is not None else ""
            _profile(axes, profiles[name], set(chosen), title, unit)
        over_depth(panels[-1], len(profiles[names[0]]["values"]))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, [label.format(100 * scores.get("confidence", 0.95)) for label in labels], loc="outside upper left", ncols=2)
        return figure


def _profile(axes: Axes, profile: Mapping[str, Any], chosen: set[int], title: str, unit: str) -> None:
    layers = len(profile["values"])
    values, low, high = (finite(profile.get(key), layers) for key in ("values", "low", "high"))
    bars = np.stack([np.fmax(values - low, 0), np.fmax(high - values, 0)])
    bars[:, np.isnan(low) | np.isnan(high)] = math.nan
    marked = np.isin(np.arange(layers), list(chosen))
    axes.axhline(0, color="black", linewidth=0.8)
    groups = ((~marked, "o", BLUE, 4.5, "layer, with {:.0f} % interval"), (marked, "D", VERMILION, 6.5, "chosen: copied"))
    for group, marker, colour, size, label in groups:
        if group.any():
            places = np.flatnonzero(group)
            axes.errorbar(places, values[group], bars[:, group], fmt=marker, color=colour, markersize=size, elinewidth=1.2, label=label)
    for layer in np.flatnonzero(marked & np.isfinite(values)).tolist():
        axes.axvspan(layer - 0.4, layer + 0.4, color=VERMILION, alpha=0.12, linewidth=0)
        if layers <= 40:
            axes.text(layer, 0.98, str(layer), transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9, color="#8a3c00")
    threshold = _scale(axes, np.concatenate([values, low, high]), values)
    axes.set_title(title + (f"; linear up to {threshold:g}, logarithmic above" if threshold else ""))
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


def losses(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw training and held-out domain loss (above) and general loss (below) over steps, from the lines of trainer_log.jsonl."""
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[int], np.ndarray]:
        found = [(entry["step"], entry[key]) for entry in log if key in entry]
        return [step for step, _ in found], finite([value for _, value in found], len(found))

    with style():
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        figure.set_label("Losses over training")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        training = series("loss")
        upper.plot(*training, color=GREY, linewidth=0.9, marker="." if len(training[0]) == 1 else None, label="training (domain)")
        upper.plot(*series("domain_loss"), color=VERMILION, marker="s", markersize=5, linewidth=1.6, label="held-out domain")
        lower.plot(*series("general_loss"), color=BLUE, marker="o", markersize=5, linewidth=1.6, label="general")
        for axes, title in ((upper, "Domain"), (lower, "General")):
            axes.set_title(title)
            axes.set_ylabel("loss (nats/token)")
            axes.margins(y=0.15)
        upper.legend(loc="upper right")
        whole_numbers(lower, "optimizer step")
        return figure
