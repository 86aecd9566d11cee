"""What an artefact was made from: a flat record of inputs, compared before it is used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError


def digest(content: Any) -> str:
    """sha256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def inputs_of(record: Any) -> Mapping[str, Any]:
    """What a record says of them: an object, or a table as it was read."""
    inputs: Mapping[str, Any] = record.get("inputs", {}) if isinstance(record, Mapping) else record.inputs
    return inputs


def changed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that differ."""
    now = json.loads(json.dumps(now, default=str))
    return sorted(key for key in {*recorded, *now} if recorded.get(key) != now.get(key))


def require_same(
    path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any], model: str, explained: Mapping[str, str] = {}
) -> None:
    """Raise InputError, naming what differs, for an artefact that was made from another model or with other settings. explained: what it
    means that an input differs, by its name, where that is not plain."""
    differing = changed(recorded, now)
    if "model" in differing:
        raise InputError(f"{path} belongs to another model than {model}: choose another output_dir")
    if differing:
        names = ", ".join(f"{name}: {explained[name]}" if name in explained else name for name in differing)
        raise InputError(f"{path} was made with other settings ({names}): choose another output_dir, or remove it to redo it")
