"""Write numbers, intervals, shares and times as text for a page."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

NONE = "\N{EN DASH}"


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with fixed decimals; None gives a dash, NaN and infinity "not finite"."""
    if value is None:
        return NONE
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "\N{MINUS SIGN}") if is_finite(value) else "not finite"


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference: +0.023, −0.209. What rounds to 0 has no sign."""
    return "+" * (is_finite(value) and round(value, digits) > 0) + number(value, digits)


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Format an interval: [1.200, 1.400]; nothing where a bound is missing or not finite."""
    return f"[{number(low, digits)}, {number(high, digits)}]" if is_finite(low) and is_finite(high) else ""


def percent(value: float | None, digits: int) -> str:
    """Format a share: 0.153 -> "15.3 %"."""
    return f"{number(100 * value, digits)} %" if is_finite(value) else number(value)


def duration(seconds: float) -> str:
    """85.3 -> "1 min 25 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
