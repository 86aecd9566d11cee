"""Provenance of an artefact: a flat mapping of its inputs, which is compared before the artefact is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError


def digest(content: Any) -> str:
    """Return the sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def inputs_of(record: Any) -> Mapping[str, Any]:
    """Return the inputs of a record, which is an object or a mapping read from JSON."""
    inputs: Mapping[str, Any] = record.get("inputs", {}) if isinstance(record, Mapping) else record.inputs
    return inputs


def changed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that differ."""
    now = json.loads(json.dumps(now, default=str))
    return sorted(key for key in {*recorded, *now} if recorded.get(key) != now.get(key))


def _values(name: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Add both values where they are numbers: anything else may be long, or a digest."""
    then, given = recorded.get(name), now.get(name)
    return f"{name}: {then}, now {given}" if isinstance(then, int | float) and isinstance(given, int | float) else name


def require_same(
    path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any], model: str, explained: Mapping[str, str] = {}
) -> None:
    """Raise InputError, naming the inputs that differ, if an artefact was made from another model or with other settings.

    explained: input -> explanation of the difference, for the message.
    """
    differing = changed(recorded, now)
    if "model" in differing:
        raise InputError(f"{path} belongs to another model than {model}: choose another output_dir")
    if differing:
        names = ", ".join(f"{name}: {explained[name]}" if name in explained else _values(name, recorded, now) for name in differing)
        raise InputError(f"{path} was made with other settings ({names}): choose another output_dir, or remove it to redo it")
