"""What a notebook shows of scores: one line of text, a pandas DataFrame, a matplotlib plot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from html import escape
from typing import TYPE_CHECKING

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import layer_indices
from adept_fast.runtime.optional_packages import optional
from adept_fast.scoring.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

LISTED = 4  # scores in the line of text


class Shown:
    """Table, plot and text of importances with intervals; a base of LayerScores and UnitScores."""

    method: str
    loss: str
    profiles: Mapping[str, Profile]
    items: int

    def row_labels(self) -> dict[str, Collection[int | str]]:
        """Return the columns that say what each value belongs to."""
        return {"layer": range(len(self.profiles[self.loss].values))}

    def to_dataframe(self) -> DataFrame:
        """Return a pandas DataFrame with one row a layer (or unit).

        The index is `layer` (of units: `layer` and `kind`). The columns are LOSS, LOSS_low and LOSS_high for each profile, the primary one
        first: answer, answer_low, answer_high, for example.
        """
        pandas = optional("pandas", "hf", "to_dataframe()")
        columns: dict[str, Collection[float | int | str]] = {**self.row_labels()}
        for name in sorted(self.profiles, key=lambda name: name != self.loss):
            profile = self.profiles[name]
            columns |= {name: profile.values, f"{name}_low": profile.low, f"{name}_high": profile.high}
        return pandas.DataFrame(columns).set_index(list(self.row_labels()))

    def plot(self, chosen: Collection[int] = (), axes: Axes | None = None, loss: str | None = None) -> Axes:
        """Draw a profile with its intervals, and return the matplotlib axes.

        chosen: rows to mark, such as the result of `select_layers`. axes: where to draw; None: a new figure. loss: which of the measured
        profiles; None: the primary one. The scale is linear near 0 and logarithmic above the median. Raises InputError for a row that does
        not exist, and for a loss that was not measured.
        """
        loss = self.loss if loss is None else loss
        if loss not in self.profiles:
            raise InputError(f"loss must be one of those measured, {', '.join(self.profiles)}, found {loss!r}: score with it in losses=")
        profile = self.profiles[loss]
        drawn = [row for row, value in enumerate(profile.values) if math.isfinite(value)]
        marked = layer_indices(chosen, len(profile.values), "chosen") if chosen else []
        if axes is None:
            axes = optional("matplotlib.pyplot", "hf", "plot()").subplots(figsize=(8, 3), layout="constrained")[1]
        for rows, colour, label in (
            ([row for row in drawn if row not in marked], "#0072B2", "importance, with interval"),
            ([row for row in drawn if row in marked], "#D55E00", "chosen"),
        ):
            values = [profile.values[row] for row in rows]
            below = [max(0.0, profile.values[row] - profile.low[row]) for row in rows]
            above = [max(0.0, profile.high[row] - profile.values[row]) for row in rows]
            if rows:
                axes.errorbar(rows, values, [below, above], fmt="o", color=colour, label=label)
        middle = sorted(abs(profile.values[row]) for row in drawn)[len(drawn) // 2] if drawn else 1.0
        axes.set_yscale("asinh", linear_width=middle or 1.0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set(xlabel="/".join(self.row_labels()), ylabel=f"{self.method}, {loss}")
        axes.locator_params("x", integer=True)
        axes.legend()
        return axes

    def __repr__(self) -> str:
        profile = self.profiles[self.loss]
        names = [" ".join(map(str, row)) for row in zip(*self.row_labels().values(), strict=True)]
        lowest = sorted(range(len(names)), key=lambda row: profile.values[row])[:LISTED]
        listed = ", ".join(f"{names[row]}: {profile.values[row]:.3f} [{profile.low[row]:.3f}, {profile.high[row]:.3f}]" for row in lowest)
        return f"{type(self).__name__}({self.method} by {self.loss} on {self.items} items; lowest of {len(names)}: {listed})"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.to_dataframe().to_html(float_format='{:.4f}'.format)}"
