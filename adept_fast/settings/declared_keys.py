"""The keys that a settings class declares, for --help, starting recipes and the reference pages. No torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from adept_fast.runtime.yaml_text import PlainScalar
from adept_fast.settings.validation import Bounds, Range
from adept_fast.settings.values import read

PLAIN = re.compile(r"[\w./~<][\w./~<> +@=-]*(?<! )")
"""Text that YAML reads as it stands, in brackets too."""


@dataclass(frozen=True)
class Key:
    """A key.

    name: with its table, such as "tune.units"
    default: MISSING if it must be given
    passed_on: whether it is one of TrainingArguments that a recipe has only if it is given
    """

    name: str
    default: Any
    bounds: Bounds | None
    meaning: str
    passed_on: bool = False

    @property
    def table(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def allowed(self) -> str:
        """Return the values that it may have: "tensor | head", "1 or more", or ""."""
        if isinstance(self.bounds, Range):
            return str(self.bounds).removeprefix("of ")
        return " | ".join(self.bounds or ())

    @property
    def told(self) -> str:
        """Return the allowed values and the meaning as one line."""
        if isinstance(self.bounds, Range):
            return f"{self.meaning} ({self.allowed})".strip()
        return ": ".join(filter(None, (self.allowed, self.meaning)))


def declared_keys(kind: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys in the order of their declaration, those of a table in its place; of TrainingArguments only the common ones."""
    for entry in sorted(fields(kind), key=lambda entry: "common" in entry.metadata):
        default = default_of(entry)
        if "common" in entry.metadata:
            for name, key in entry.metadata["common"].items():
                yield Key(prefix + name, key.default, key.metadata["bounds"], key.metadata["meaning"], name not in default)
        elif is_dataclass(default) and not hasattr(default, "of"):
            yield from declared_keys(type(default), f"{prefix}{entry.name}.")
        else:
            yield Key(prefix + entry.name, default, entry.metadata.get("bounds"), entry.metadata.get("meaning", ""))


def default_of(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def written(value: Any) -> str:
    """Return a value as it is written in a recipe and after key=. Text that would be read otherwise is quoted."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {entry.name: getattr(value, entry.name) for entry in fields(value) if getattr(value, entry.name) != default_of(entry)}
        return written(next(iter(given.values())) if [*given] == ["path"] else given)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    plain = isinstance(value, str) and PLAIN.fullmatch(value) and read(PlainScalar(value)) == value
    return value if plain else json.dumps(value, ensure_ascii=False)
