"""What of the keys under `score` no model can be scored by, found before one is loaded."""

from __future__ import annotations

from typing import Any

from adept_fast.errors import InputError
from adept_fast.families import layer_indices
from adept_fast.importance.cheap import CHEAP
from adept_fast.importance.layers import METHODS
from adept_fast.importance.masking import LOSSES
from adept_fast.importance.unit_masking import GRANULARITIES


def check_scoring(score: Any, layers: int) -> None:
    """score: its keys as attributes; layers: of the model. Raises InputError naming the key."""
    for key, known in (("method", METHODS), ("loss", LOSSES), ("units", GRANULARITIES)):
        value = getattr(score, key)
        if value is not None and value not in known:
            raise InputError(f"score.{key} must be one of {', '.join(known)}, found {value!r}")
    for method in score.compare:
        if method not in CHEAP or score.compare.count(method) > 1:
            raise InputError(f"score.compare takes {', '.join(CHEAP)}, each once, found {', '.join(score.compare)}")
    if not 0 <= score.seed < 2**32:
        raise InputError(f"score.seed must be from 0 to {2**32 - 1}, found {score.seed}")
    if score.unit_layers is not None:
        if score.units is None:
            raise InputError("score.unit_layers: no units are masked: set score.units too, or leave it out")
        layer_indices(score.unit_layers, layers, "score.unit_layers")
