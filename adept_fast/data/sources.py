"""Where records come from: .jsonl, .json, .parquet, .txt (each but parquet also gzipped), a datasets name, or the bundled probe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

from adept_fast.errors import InputError

GENERAL = "general"  # the name of the bundled general probe
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")


@dataclass(frozen=True)
class Source:
    """A corpus: file or datasets name, its split and text column, and how many passes over it one epoch makes (`weight`).
    share: the part of a streamed run's tokens that come from it, from the start to the end of the run going linearly to `share_end`."""

    path: str
    split: str | None = None
    column: str | None = None
    weight: float = 1.0
    share: float | None = None
    share_end: float | None = None

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Source) -> Source:
        if isinstance(value, Source):
            return value
        if isinstance(value, str):
            return cls(value)
        known = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or "path" not in value or set(value) - known:
            raise InputError(f"a source is a path or {{path, split, column, weight, share, share_end}}, found {value!r}")
        source = cls(**value)
        for key, wanted in (("path", str), ("split", (str, NoneType)), ("column", (str, NoneType))):
            if not isinstance(getattr(source, key), wanted):
                raise InputError(f"a source's {key} must be text, found {getattr(source, key)!r}")
        if isinstance(source.weight, bool) or not isinstance(source.weight, (int, float)) or not 0 < source.weight < math.inf:
            raise InputError(f"{source.path}: weight must be a number above 0, found {source.weight!r}")
        for key in ("share", "share_end"):
            share = getattr(source, key)
            if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1):
                raise InputError(f"{source.path}: {key} must be a number from 0 to 1, found {share!r}")
        if source.share is None and source.share_end is not None:
            raise InputError(f"{source.path}: share_end needs share, the part that it starts from")
        return source

    @property
    def file(self) -> Path:
        """Where it lies, if it is a file."""
        bundled = resources.files("adept_fast") / "data" / "general_probe.jsonl"
        return Path(str(bundled)) if self.path == GENERAL else Path(self.path).expanduser()


@dataclass(frozen=True)
class Record:
    """One row of a source, and where it stands there ("file.jsonl:12"), for messages."""

    content: Mapping[str, Any]
    where: str


def kind_of(source: Source) -> str | None:
    """The kind of a file, one of SUFFIXES; None for what datasets is to load. Raises InputError for a missing or unknown file."""
    path = source.file
    kind = next((suffix for suffix in SUFFIXES if path.name.removesuffix(".gz").endswith(suffix)), None)
    if kind is None and path.is_file():
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)} (.gz too), or a datasets name")
    if kind is None or path.is_dir():
        return None
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return kind
