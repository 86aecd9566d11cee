"""Shared by all charts: colours and style, values with gaps, and writing a figure as a PNG file or an inline SVG."""

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

WIDTH = 6.5  # inches
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito: distinct for every kind of colour vision
STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
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


def finite(values: Sequence[float | None] | None, length: int) -> np.ndarray:
    """Return values as fp64 [length], with NaN for those that are missing, null or not finite."""
    given = [math.nan if value is None else float(value) for value in values or ()][:length]
    array = np.array(given + [math.nan] * (length - len(given)))
    array[~np.isfinite(array)] = math.nan
    return array


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 150 dpi. The file appears once it is complete."""
    with style(), staged_file(path) as staging:
        figure.savefig(staging, format="png", dpi=150)


def to_svg(figure: Figure) -> str:
    """Return a figure as an inline <svg> element: full width, text as text, unique ids, no prolog or metadata."""
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
    return f'<svg {view_box[0]} width="100%" role="img" aria-label="{escape(str(figure.get_label()))}">{body}'
