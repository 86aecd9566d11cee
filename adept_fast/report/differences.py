"""The chart of differences from the base: a row a difference with its interval, drawn by the page in its own text size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adept_fast.evaluation.results import Change
from adept_fast.report.drawing import LEAST
from adept_fast.report.numbers import interval, signed

EDGE = 4  # per cent of the width left free at each side


@dataclass(frozen=True)
class Bar:
    """A row. at, low, high: places in per cent of the width. tone: a class of style.css"""

    label: str
    text: str
    at: float
    low: float
    high: float
    tone: str


@dataclass(frozen=True)
class Differences:
    """A chart, in per cent of its width. ticks: (place, number)"""

    bars: tuple[Bar, ...]
    zero: float
    ticks: tuple[tuple[float, str], ...]


def tone(change: Change, higher_is_better: bool = False) -> str:
    """Judge a change by its interval: better, worse, or none if the interval holds 0."""
    if not change.certain:
        return "none"
    return "better" if (change.value > 0) == higher_is_better else "worse"


def differences(rows: Iterable[tuple[str, Change]], shared: Iterable[Change] = ()) -> Differences:
    """Lay out changes of a loss. shared: changes that the axis must hold too, so that two charts have the same axis."""
    rows = list(rows)
    ends = [0.0, *(bound for change in (*(change for _, change in rows), *shared) for bound in (change.low, change.value, change.high))]
    low, high = min(ends), max(ends)
    missing = max(0.0, LEAST - (high - low)) / 2
    low, high = low - missing, high + missing

    def place(value: float) -> float:
        return round(EDGE + (100 - 2 * EDGE) * (value - low) / (high - low), 2)

    bars = []
    for label, change in rows:
        text = f"{signed(change.value)} {interval(change.low, change.high)}"
        bars.append(Bar(label, text, place(change.value), place(change.low), place(change.high), tone(change)))
    ticks = tuple((place(tick), signed(tick, digits) if tick else "0") for tick, digits in _ticks(low, high))
    return Differences(tuple(bars), place(0), ticks)


def _ticks(low: float, high: float) -> Sequence[tuple[float, int]]:
    """Choose at most five round numbers from low to high, each with the decimals it needs."""
    power = math.floor(math.log10(high - low)) - 1
    step, digits = next(
        (base * 10.0**exponent, max(0, -exponent))
        for exponent in range(power, power + 3)
        for base in (1, 2, 5)
        if (high - low) / (base * 10.0**exponent) <= 4
    )
    return [(step * count, digits) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
