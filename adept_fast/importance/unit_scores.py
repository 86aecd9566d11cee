"""The result of masking the parts of layers: one importance per unit, with its uncertainty, for each loss that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.artefacts import read_json
from adept_fast.errors import InputError
from adept_fast.importance.scores import SCHEMA, ItemScores, Profile, Profiled, items_path, load_items
from adept_fast.intervals import CONFIDENCE


@dataclass(frozen=True)
class UnitScores(Profiled):
    """Profiles by loss name as of LayerScores, whose values are those of units; unit i is the part `kinds[i]` of layer `layers[i]`."""

    granularity: str
    loss: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    profiles: Mapping[str, Profile]
    items: int
    tokens: int
    seconds: float
    model: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    confidence: float = CONFIDENCE
    method: str = "unit_masking"
    schema: int = SCHEMA
    per_item: Mapping[str, ItemScores] = field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> UnitScores:
        """Read unit_scores.json. Raises InputError when it is missing, malformed or of another schema."""
        content = read_json(Path(path))
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {content.get('schema')!r} is not the known {SCHEMA}: delete it to score again")
        try:
            profiles = {name: Profile.of(entry) for name, entry in content.pop("profiles").items()}
            layers, kinds = tuple(content.pop("layers")), tuple(content.pop("kinds"))
            return cls(profiles=profiles, layers=layers, kinds=kinds, per_item=load_items(items_path(path)), **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not unit scores ({error}): delete it to score again") from None
