"""Where records come from: a file, a folder, a glob, a datasets name, or the bundled probe; and a record as it stands there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.settings.validation import Range, check, declare, shown

GENERAL = "general"  # the name of the bundled general probe
TEMPLATES = ("plain", "alpaca", "chat")


@dataclass(frozen=True)
class Source:
    """A corpus: file, folder, glob or datasets name, its split and text column, and how many passes over it one epoch makes (`weight`).
    template: how an instruction and its output are written as a text: end to end, as Alpaca has it, or by the tokenizer's chat template.
    share: the part of a streamed run's tokens that come from it, from the start to the end of the run going linearly to `share_end`."""

    path: str
    split: str | None = None
    column: str | None = None
    template: str = declare("plain", TEMPLATES)
    weight: float = declare(1.0, Range(0, 1000, above=True))
    share: float | None = declare(None, Range(0, 1))
    share_end: float | None = declare(None, Range(0, 1))

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Source) -> Source:
        if isinstance(value, Source):
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
        """Where it lies, if it is a file."""
        bundled = resources.files("adept_fast") / "data" / "general_probe.jsonl"
        return Path(str(bundled)) if self.path == GENERAL else Path(self.path).expanduser()


@dataclass(frozen=True)
class Record:
    """One row of a source, and where it stands there ("file.jsonl:12"), for messages.

    column and template: the source's; nulls: columns of a table that the row leaves null; fault: why it could not be read.
    """

    content: Mapping[str, Any]
    where: str
    column: str | None = None
    template: str = "plain"
    nulls: frozenset[str] = frozenset()
    fault: str | None = None
