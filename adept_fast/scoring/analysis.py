"""Check the analysis in scores.json: what stability.py and method_comparison.py compute, as the charts read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adept_fast.settings.validation import shown


def check_analysis(analysis: Mapping[str, Any], layers: int) -> None:
    """Raise ValueError, naming the key, for an analysis of scores of `layers` layers that lacks a number or has one too many."""
    if "stability" in analysis:
        found = _table("analysis.stability", analysis["stability"])
        _layers("analysis.stability.layers", found.get("layers"), layers)
        _numbers("analysis.stability.draws", found.get("draws"))
        if not isinstance(found.get("sizes"), list) or not found["sizes"]:
            raise ValueError(f"analysis.stability.sizes: {shown(found.get('sizes'))}, no list")
        for index, size in enumerate(found["sizes"]):
            name = f"analysis.stability.sizes[{index}]"
            for key, *shape in (("items",), ("same",), ("frequency", layers)):
                _numbers(f"{name}.{key}", _table(name, size).get(key), *shape)
    if "conflicts" in analysis:
        found = _table("analysis.conflicts", analysis["conflicts"])
        _layers("analysis.conflicts.layers", found.get("layers"), layers)
        _names("analysis.conflicts.profiles", found.get("profiles"), 2)
        _numbers("analysis.conflicts.spearman", found.get("spearman"), null=True)
        for name in found["profiles"]:
            ranks = _table("analysis.conflicts.ranks", found.get("ranks")).get(name)
            _numbers(f"analysis.conflicts.ranks.{name}", ranks, layers, 3, null=True)
    if "comparison" in analysis:
        found = _table("analysis.comparison", analysis["comparison"])
        names = _names("analysis.comparison.names", found.get("names"))
        _numbers("analysis.comparison.values", found.get("values"), names, layers, null=True)
        for key in ("spearman", "low", "high"):
            _numbers(f"analysis.comparison.{key}", found.get(key), names, names, null=True)


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {shown(value)}, no table")
    return value


def _names(name: str, value: Any, count: int | None = None) -> int:
    texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if not texts or not value or len(value) != (count or len(value)):
        raise ValueError(f"{name}: {shown(value)}, no list of names")
    return len(value)


def _layers(name: str, value: Any, layers: int) -> None:
    if not isinstance(value, list) or not all(type(entry) is int and 0 <= entry < layers for entry in value):
        raise ValueError(f"{name}: {shown(value)}, no list of layers from 0 to {layers - 1}")


def _numbers(name: str, value: Any, *shape: int, null: bool = False) -> None:
    """Require a number, or nested lists of numbers. null: allow null in place of one."""
    if shape:
        if not isinstance(value, list) or len(value) != shape[0]:
            raise ValueError(f"{name}: {shown(value)}, no list of {shape[0]}")
        for index, entry in enumerate(value):
            _numbers(f"{name}[{index}]", entry, *shape[1:], null=null)
    elif not (null and value is None) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{name}: {shown(value)}, no number")
