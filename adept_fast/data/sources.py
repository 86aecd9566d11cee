"""Describe a source of records: a file, folder, glob, datasets name or the bundled probe; and a raw record from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

from adept_fast.errors import InputError
from adept_fast.settings.validation import Range, check, declare, shown

GENERAL = "general"  # the name of the bundled general probe
TEMPLATES = ("plain", "alpaca", "chat")


@dataclass(frozen=True)
class Source:
    """A corpus.

    path: file, folder, glob or datasets name
    split, column: of the dataset, and the column with the text
    template: how instruction and output become a text: end to end, by Alpaca's template, or by the tokenizer's chat template
    weight: passes over it per epoch
    share, share_end: its part of a streamed run's tokens, which moves linearly from the first at the start to the second at the end
    """

    path: str
    split: str | None = None
    column: str | None = None
    template: str = declare("plain", TEMPLATES)
    weight: float = declare(1.0, Range(0, 1000, above=True))
    share: float | None = declare(None, Range(0, 1))
    share_end: float | None = declare(None, Range(0, 1))

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Source) -> Self:
        if isinstance(value, cls):
            return value
        table, known = {"path": value} if isinstance(value, str) else value, [entry.name for entry in fields(cls)]
        if not isinstance(table, Mapping) or "path" not in table or set(table) - set(known):
            raise InputError(f"a source is a path or {{{', '.join(known)}}}, found {shown(value)}")
        check(cls, **table)
        source = cls(**table)
        if source.share is None and source.share_end is not None:
            raise InputError(f"{source.path}: share_end needs share, the part that it starts from")
        return source

    @property
    def file(self) -> Path:
        """Return its path, if it is a file or folder."""
        bundled = resources.files("adept_fast") / "data" / "general_probe.jsonl"
        return Path(str(bundled)) if self.path == GENERAL else Path(os.path.expanduser(self.path))


@dataclass(frozen=True)
class Record:
    """One row of a source.

    where: its place, for messages: "file.jsonl:12"
    column, template: of the source
    nulls: columns of a table that are null in this row
    fault: why it could not be read, if it could not
    """

    content: Mapping[str, Any]
    where: str
    column: str | None = None
    template: str = "plain"
    nulls: frozenset[str] = frozenset()
    fault: str | None = None
