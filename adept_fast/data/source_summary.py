"""Count what was read of a source, and what was left out and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adept_fast.data.records import MalformedRecord, unread
from adept_fast.data.source_files import SourceFiles, describe_skipped
from adept_fast.data.sources import GENERAL, Record, Source

T = TypeVar("T")
ELSEWHERE = "held out or in the probe or eval"


@dataclass
class SourceSummary:
    """Counts of one source.

    limit: how many malformed rows may be left out; None: none, and the error message offers no setting
    files: of the source, if it consists of files
    documents: read and not left out; None if not counted
    empty: left out because their text is empty or null
    malformed: file and line of each row left out -> what is wrong with it
    unread: keys that are not read
    elsewhere: purpose -> documents left out because they serve it
    tokens: of the documents; None if not counted
    control_tokens: token -> how often it occurs in the documents whose tokens were counted
    """

    source: Source
    limit: int | None = None
    files: SourceFiles | None = None
    documents: int | None = 0
    empty: int = 0
    malformed: dict[str, str] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    elsewhere: dict[str, int] = field(default_factory=dict)
    tokens: int | None = None
    control_tokens: dict[str, int] = field(default_factory=dict)

    def take(self, record: Record, read: Callable[[Record], T | None]) -> T | None:
        """Return `read(record)`, or None if the record is left out, and count it. Raises MalformedRecord beyond the limit."""
        try:
            found = read(record)
        except MalformedRecord as error:
            self.malformed[record.where] = str(error)
            self.check()
            return None
        if found is None:
            self.empty += 1
            return None
        self.documents = (self.documents or 0) + 1
        if self.source.path != GENERAL:
            self.unread |= unread(record)
        return found

    def serves_elsewhere(self, purpose: str) -> None:
        """Move the last document from those read to those that serve another purpose."""
        self.documents = (self.documents or 0) - 1
        self.elsewhere[purpose] = self.elsewhere.get(purpose, 0) + 1

    def counts(self) -> dict[str, Any]:
        """Return the counts as JSON types."""
        kept = {key: getattr(self, key) for key in ("documents", "empty", "malformed", "elsewhere", "tokens", "control_tokens")}
        return {**kept, "unread": sorted(map(str, self.unread))}

    def restore(self, counts: Mapping[str, Any]) -> None:
        for key, value in counts.items():
            setattr(self, key, set(value) if key == "unread" else value)

    def check(self) -> None:
        """Raise MalformedRecord if more rows are malformed than the limit."""
        if len(self.malformed) <= (self.limit or 0):
            return
        last = [*self.malformed.values()][self.limit or 0]
        if self.limit is None:
            raise MalformedRecord(last)
        so_far = f"; {len(self.malformed)} rows of {self.source.path} are malformed so far" if self.limit else ""
        raise MalformedRecord(f"{last}{so_far}; repair it, or set malformed_rows={len(self.malformed)} or more to leave such rows out")

    @property
    def left_out(self) -> str:
        """Describe what was left out, with the first malformed row; "" if nothing was."""
        first = f" ({next(iter(self.malformed))}{', ...' if len(self.malformed) > 1 else ''})" if self.malformed else ""
        counts = {"empty": self.empty, **self.elsewhere}
        parts = [f"{count:,} {why}" for why, count in counts.items() if count] + [f"{len(self.malformed)} malformed{first}"] * bool(first)
        return ", ".join([*parts, *filter(None, [describe_skipped(self.files.skipped) if self.files else ""])])

    def notes(self) -> list[str]:
        """Return lines about what was left out and which keys are not read."""
        left = [f"{self.source.path}: left out: {self.left_out}"] if self.left_out else []
        return [*left, *self.keys_not_read()]

    def keys_not_read(self) -> list[str]:
        return [f"{self.source.path}: keys that are not read: {', '.join(sorted(map(str, self.unread)))}"] if self.unread else []


HEADER = ("read", "for", "files", "documents", "tokens", "left out")


def table(rows: Sequence[tuple[str, SourceSummary]]) -> list[str]:
    """Format a table of sources as lines. rows: the purpose of each, and its summary."""
    cells: list[tuple[str, ...]] = [HEADER]
    for purpose, summary in rows:
        files = "-" if summary.files is None else f"{len(summary.files.files):,}"
        counts = ["not counted" if count is None else f"{count:,}" for count in (summary.documents, summary.tokens)]
        cells.append((summary.source.path, purpose, files, *counts, summary.left_out or "nothing"))
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER) - 1)]
    return ["  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in cells]
