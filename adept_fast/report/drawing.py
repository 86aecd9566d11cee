"""Shared by all charts: colours and style, values with gaps, and writing a figure as a PNG file or as an SVG in the page's colours."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from adept_fast.runtime.atomic_files import staged_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 0.05  # nats per token: the shortest axis of a loss, so that a difference of no weight looks like none
WIDTH = 5.1  # inches: as wide as a phone, its text is 11 pixels high there
BLUE, VERMILION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito: distinct for every kind of colour vision
SKY, AMBER, GREY, INK, GRID, EMBER = "#56b4e9", "#e69f00", "#777777", "#000000", "#e4e4e4", "#8a3c00"
VARIABLES = {
    **{BLUE: "blue", VERMILION: "vermilion", GREEN: "green", PINK: "pink", SKY: "sky", AMBER: "amber"},
    **{GREY: "grey", INK: "ink", GRID: "line", EMBER: "ember"},
}
"""Colour -> the variable of style.css that stands for it on a page, where it has a light and a dark form."""
COLOURS = (VERMILION, BLUE, GREEN, PINK, AMBER, SKY, INK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize", "figure.labelsize"), 10.5),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 10.5),
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "text.parse_math": False,  # names may hold a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "adept_fast",
}


def style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(cast(Any, STYLE))


def whole_numbers(axes: Axes, label: str) -> None:
    """Label an x axis that counts `label` in whole numbers."""
    axes.set_xlabel(label)
    axes.locator_params("x", integer=True)


def over_depth(axes: Axes, layers: int) -> None:
    whole_numbers(axes, "layer (0 is next to the input)")
    axes.set_xlim(-0.8, layers - 0.2)


def least_span(least: float, *axes: Any) -> None:
    """Widen each axis (figure.axes[0].yaxis, say) to at least `least` units, so that a difference of no weight looks like none."""
    for axis in axes:
        low, high = axis.get_view_interval()
        missing = max(0.0, least - (high - low)) / 2
        axis.axes.autoscale(False, axis=axis.axis_name)
        axis.set_view_interval(low - missing, high + missing, ignore=True)


def finite(values: Sequence[float | None]) -> np.ndarray:
    """Return values as fp64, with NaN for those that are missing or not finite."""
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    array[~np.isfinite(array)] = math.nan
    return array


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 180 dpi. The file appears once it is complete."""
    with style(), staged_file(path) as staging:
        figure.savefig(staging, format="png", dpi=180)


def to_svg(figure: Figure) -> str:
    """Return a figure as an inline <svg> element: text as text, the page's colours, unique ids, no prolog or metadata."""
    with style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="none", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    prefix = "c" + hashlib.sha256(text.encode()).hexdigest()[:10]
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib wrote an SVG without viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: f"var(--{VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0], body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    return f'<svg {view_box[0]} role="img" aria-label="{escape(str(figure.get_label()))}">{body}'
