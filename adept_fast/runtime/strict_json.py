"""Standard JSON, without NaN and infinity, so that every reader can parse the files that this package writes."""

from __future__ import annotations

import json
import math
from typing import Any

TAG = "__float__"  # of transformers, in config.json: {"__float__": "Infinity"}
TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf}


def dumps(content: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Serialise a value. Raises ValueError for NaN and infinity: callers convert them, see `finite`."""
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)


def loads(text: str) -> Any:
    """Parse JSON. Raises ValueError for a key given twice in one object, and for nesting or numbers beyond what Python reads."""
    try:
        return json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs: json itself would keep the last value of a key given twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {ascii(next(key for key in table if keys.count(key) > 1))[:80]} twice in one object")
    return table


def finite(content: Any) -> Any:
    """Replace NaN and infinity by None."""
    return _mapped(content, None)


def tagged(content: Any) -> Any:
    """Replace infinities as transformers does in config.json; Mamba's time_step_limit has one, for example."""
    return _mapped(content, {value: {TAG: name} for name, value in TAGGED.items()})


def untagged(content: Any) -> Any:
    """Invert `tagged`."""
    if isinstance(content, dict):
        if content.keys() == {TAG} and content[TAG] in TAGGED:
            return TAGGED[content[TAG]]
        return {key: untagged(value) for key, value in content.items()}
    return [untagged(value) for value in content] if isinstance(content, list) else content


def _mapped(content: Any, special: dict[float, Any] | None) -> Any:
    if isinstance(content, dict):
        return {key: _mapped(value, special) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_mapped(value, special) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if special is None else special.get(content, content)
    return content
