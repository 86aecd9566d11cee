"""The record in a checkpoint: which layers are copies, of which layers of which source, selected by which scores.

It is stored in adept_config.json, and under the key `adept_config` in config.json, which transformers preserves through save_pretrained,
its Trainer's checkpoints and the hub. docs/explanation/record.md has the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.digest import KIND
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.strict_json import tagged, untagged
from adept_fast.settings.validation import shown

FILE = "adept_config.json"
KEY = "adept_config"  # in config.json
SCHEMA = 2


@dataclass(frozen=True)
class Inserted:
    """A copy.

    layer: its index in the expanded model
    copied_from: the index of its layer in the source, a model without copies
    round: 0 for the first expansion, 1 for an expansion of the result, and so on
    """

    layer: int
    copied_from: int
    round: int = 0


@dataclass(frozen=True)
class AdeptConfig:
    """The record of an expanded model.

    source: name_or_path, identity, tensors_digest, num_hidden_layers and config (its config.json)
    selection: how the layers were chosen
    inputs: what the stage was made from
    proof: what was compared when the checkpoint was written
    initialisation: of the copies of the last expansion
    """

    inserted: tuple[Inserted, ...]
    source: Mapping[str, Any] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    proof: Mapping[str, Any] = field(default_factory=dict)
    initialisation: str = "zero_output"
    schema: int = SCHEMA

    @property
    def copies(self) -> tuple[int, ...]:
        return tuple(entry.layer for entry in self.inserted)

    @property
    def trained(self) -> tuple[int, ...]:
        """Return the copies that tuning trains: those of the last expansion."""
        last = max((entry.round for entry in self.inserted), default=0)
        return tuple(entry.layer for entry in self.inserted if entry.round == last)

    def original(self, index: int) -> int:
        """Return the index in the expanded model of the source's layer `index`."""
        at = index
        for copy in sorted(self.copies):
            at += copy <= at
        return at

    def as_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = tagged(json.loads(json.dumps(asdict(self), default=str)))
        return record

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, self.as_dict())

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any] | None = None) -> AdeptConfig:
        """Read the record of a checkpoint, as `find` does. Raises InputError if it is missing, malformed or of an unknown schema."""
        record = cls.find(folder, config)
        if record is None:
            raise InputError(f"{folder}: no {FILE}, and no {KEY} in config.json: not an expanded model, or one that lost its record")
        return record

    @classmethod
    def find(cls, folder: Path, config: Mapping[str, Any] | None = None) -> AdeptConfig | None:
        """Read the record of a checkpoint; None if it has none. config: the content of its config.json, if it was read already."""
        folder = Path(folder)
        if (folder / FILE).is_file():
            return cls._read(read_json(folder / FILE), folder / FILE)
        path = folder / "config.json"
        if config is None:
            config = read_json(path) if path.is_file() else {}
        found = config.get(KEY)
        return None if found is None else cls._read(found, path)

    @classmethod
    def of(cls, model: object) -> AdeptConfig | None:
        """Return the record of a model in memory, attached by expansion or loaded with its config; None if it has none."""
        attached = getattr(model, "adept_config", None)
        if isinstance(attached, cls):
            return attached
        config = getattr(model, "config", None)
        if config is None or (found := getattr(config, KEY, None)) is None:
            return None
        path = Path(getattr(config, "name_or_path", ""), "config.json")
        record = cls._read(found, path)
        record.require_layers(config.get_text_config(decoder=True).num_hidden_layers, path)
        return record

    def require_layers(self, layers: int, path: Path) -> None:
        """Raise InputError unless `layers` is the number of layers of the source plus the copies."""
        source = self.source.get("num_hidden_layers")
        if layers <= self.copies[-1] or source not in (None, layers - len(self.copies)):
            raise InputError(
                f"{path}: {layers} layers, but its record has {len(self.copies)} copies, up to layer {self.copies[-1]}, in a source of "
                f"{source}: it belongs to another checkpoint"
            )

    @classmethod
    def _read(cls, content: Any, path: Path) -> AdeptConfig:
        schema = content.get("schema") if isinstance(content, dict) else content
        if schema != SCHEMA:
            raise InputError(f"{path}: schema {shown(schema)} is not {SCHEMA}: use the version of adept_fast that wrote it")
        try:
            entries = [Inserted(**{"round": 0, **entry}) for entry in content["inserted"]]
            record = cls(**{**untagged(content), "inserted": tuple(entries)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a record of an expansion ({error}): expand the model again") from None
        if wrong := record._wrong():
            raise InputError(f"{path}: not a record of an expansion ({wrong}): restore it, or expand the model again")
        return record

    def _wrong(self) -> str | None:
        """Describe the first field that is of a wrong type or contradicts another; None if there is none."""
        tables = ("source", "selection", "parameters", "versions", "inputs", "proof")
        if wrong := [name for name in tables if not isinstance(getattr(self, name), Mapping)]:
            return f"{wrong[0]} is no table"
        for name, kind, what in (("parameters", int, "number"), ("versions", str, "text")):
            if wrong := [key for key, value in getattr(self, name).items() if not isinstance(value, kind)]:
                return f"{name}.{wrong[0]} is {shown(getattr(self, name)[wrong[0]])}, no {what}"
        if not isinstance(self.initialisation, str):
            return f"initialisation is {shown(self.initialisation)}, no name"
        for entry in self.inserted:
            if wrong := [key for key, value in vars(entry).items() if type(value) is not int or value < 0]:
                return f"{wrong[0]} of a copy is {shown(vars(entry)[wrong[0]])}, no index"
        if not self.inserted:
            return "inserted names no copy"
        if list(self.copies) != sorted({*self.copies}):
            return f"its copies {list(self.copies)} are not ascending, each once"
        for copies, entry in enumerate(self.inserted):  # right after the layer it copies and that one's earlier copies
            if entry.copied_from != entry.layer - copies - 1:
                return f"layer {entry.layer} cannot be a copy of the source's layer {entry.copied_from}"
        layers, config = self.source.get("num_hidden_layers"), self.source.get("config")
        if layers is not None and (type(layers) is not int or layers <= self.inserted[-1].copied_from):
            return f"a source of {shown(layers)} layers has no layer {self.inserted[-1].copied_from}"
        alpha = self.selection.get("alpha", 1.0)
        if type(alpha) not in (int, float) or not 0 <= alpha < inf:
            return f"selection.alpha is {shown(alpha)}, no share of what training made of the copies"
        if config is not None and not isinstance(config, Mapping):
            return "source.config is no table"
        for table, key in (("source", "identity"), ("source", "tensors_digest"), ("proof", "copies_digest")):
            digest = getattr(self, table).get(key)
            if digest and not (isinstance(digest, str) and digest.startswith(KIND)):
                return f"{table}.{key} is {shown(digest)}, no digest that begins with {KIND}"
        if self.initialisation not in PRESERVING:
            return f"initialisation {shown(self.initialisation)} is none of {', '.join(PRESERVING)}"
        return None


def record_of(model: object) -> AdeptConfig:
    """Return the record of an expanded model. Raises InputError for a model that was not expanded."""
    record = AdeptConfig.of(model)
    if record is None:
        raise InputError("this model has no adept_config: expand it first (expand_model, or adept-fast expand)")
    return record


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine results."""
    import torch
    import transformers

    from adept_fast import __version__

    return {"adept_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
