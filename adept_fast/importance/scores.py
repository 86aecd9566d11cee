"""The result of scoring layers: one importance per layer, with its uncertainty, for each loss that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.artefacts import read_json, write_json
from adept_fast.errors import InputError
from adept_fast.intervals import CONFIDENCE

SCHEMA = 1


@dataclass(frozen=True)
class Profile:
    """values: loss without the layer minus loss with it, nats per supervised token [layers]; low, high: bootstrap interval over items."""

    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    base_loss: float | None


@dataclass(frozen=True)
class LayerScores:
    """Profiles by loss name ("answer", "kl", "all"); `loss` names the primary one, that layers are selected by."""

    method: str
    loss: str
    profiles: Mapping[str, Profile]
    items: int
    tokens: int
    seconds: float
    model: str = ""
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    confidence: float = CONFIDENCE
    schema: int = SCHEMA

    @property
    def values(self) -> tuple[float, ...]:
        return self.profiles[self.loss].values

    @property
    def low(self) -> tuple[float, ...]:
        return self.profiles[self.loss].low

    @property
    def high(self) -> tuple[float, ...]:
        return self.profiles[self.loss].high

    @property
    def base_loss(self) -> float | None:
        return self.profiles[self.loss].base_loss

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> LayerScores:
        """Read scores.json. Raises InputError when it is missing, malformed or of another schema."""
        content = read_json(Path(path))
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {content.get('schema')!r} is not the known {SCHEMA}: delete it to score again")
        try:
            profiles = {
                name: Profile(tuple(entry["values"]), tuple(entry["low"]), tuple(entry["high"]), entry["base_loss"])
                for name, entry in content.pop("profiles").items()
            }
            return cls(profiles=profiles, notes=tuple(content.pop("notes")), **content)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not layer scores ({error}): delete it to score again") from None
