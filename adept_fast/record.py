"""The record that travels in the checkpoint, adept_config.json: which layers are new, copied from where, from which source and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.artefacts import read_json, write_json
from adept_fast.errors import InputError

FILE = "adept_config.json"
SCHEMA = 1


@dataclass(frozen=True)
class Inserted:
    """A copy: its index in the expanded model, and the index of the layer it was copied from in the source."""

    layer: int
    copied_from: int


@dataclass(frozen=True)
class AdeptConfig:
    """source: name_or_path, sha256, num_hidden_layers; selection: how the layers were chosen; inputs: what the stage was made from."""

    inserted: tuple[Inserted, ...]
    source: Mapping[str, Any] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def copies(self) -> tuple[int, ...]:
        return tuple(entry.layer for entry in self.inserted)

    def source_index(self, entry: Inserted) -> int:
        """Where the layer that `entry` was copied from stands in the expanded model: right before its copy."""
        return entry.layer - 1

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> AdeptConfig:
        path = Path(folder) / FILE
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise InputError(
                f"{path}: schema {content.get('schema')!r} is not the known {SCHEMA}: use the version of adept_fast that wrote it"
            )
        try:
            inserted = tuple(Inserted(int(entry["layer"]), int(entry["copied_from"])) for entry in content.pop("inserted"))
            return cls(inserted=inserted, **content)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a record of an expansion ({error})") from None


def record_of(model: object) -> AdeptConfig:
    """The record of an expanded model. Raises InputError for a model that was not expanded."""
    record = getattr(model, "adept_config", None)
    if not isinstance(record, AdeptConfig):
        raise InputError("this model has no adept_config: expand it first (expand_model, or adept-fast expand)")
    return record


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    import torch
    import transformers

    from adept_fast import __version__

    return {"adept_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
