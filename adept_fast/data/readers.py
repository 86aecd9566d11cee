"""Readers of sources larger than memory: records one after another, and a position from which reading goes on exactly.

A position is a small JSON-like dict: a byte offset of a text file, a row of a parquet file, datasets' own state of a streamed dataset
(exact without datasets' shuffle buffer, which is lost on resume; shuffling is data/stream.py's).
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from adept_fast.data.sources import GENERAL, LINES_PER_PIECE, Record, Source, kind_of, parse_line, without_nulls
from adept_fast.errors import InputError

ROWS = 1024  # of a parquet file read at once
BUFFER = 1 << 24


class Reader(Protocol):
    """`records` goes on from `position` to the end of the source; `position` is always behind the last record that it gave."""

    position: dict[str, Any]

    def records(self) -> Iterator[Record]: ...

    def identity(self) -> str: ...


def reader(source: Source) -> Reader:
    """The reader of a source, at its beginning. Raises InputError for a source that cannot be streamed."""
    if source.path == GENERAL:
        return Lines(Path(str(resources.files("adept_fast") / "data" / "general_probe.jsonl")))
    path, kind = Path(source.path).expanduser(), kind_of(source)
    if kind is None:
        return Streamed(source)
    if kind == ".json":
        raise InputError(f"{path}: a JSON array cannot be streamed: write one object a line (.jsonl), or set tune.streaming=false")
    return {".jsonl": Lines, ".txt": Paragraphs, ".parquet": Rows}[kind](path)


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.position: dict[str, Any] = dict.fromkeys(self.COUNTS, 0)

    COUNTS: tuple[str, ...] = ("byte", "record")

    def identity(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(BUFFER):
                digest.update(part)
            return digest.hexdigest()

    def _open(self) -> BinaryIO:
        file = gzip.open(self.path) if self.path.name.endswith(".gz") else self.path.open("rb")
        file.seek(self.position["byte"])
        return file

    def _lines(self) -> Iterator[tuple[str, int]]:
        """Lines from the position on, and the offset behind each."""
        try:
            with self._open() as file:
                encoding = "utf-8" if self.position["byte"] else "utf-8-sig"
                while line := file.readline():
                    yield line.decode(encoding), file.tell()
                    encoding = "utf-8"
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None


class Lines(_File):
    """One JSON object a line."""

    def records(self) -> Iterator[Record]:
        number = self.position["record"]
        for line, behind in self._lines():
            number += 1
            record = parse_line(line, f"{self.path}:{number}")
            self.position = {"byte": behind, "record": number}
            if record is not None:
                yield record


class Paragraphs(_File):
    """Texts that blank lines part; a file that holds one only is cut every 20 lines."""

    def records(self) -> Iterator[Record]:
        longest = self._longest()
        number, lines, behind = self.position["record"], [], self.position["byte"]
        for line, offset in self._lines():
            line = line.replace("\r\n", "\n")
            if line.strip():
                lines.append(line)
            if lines and (len(lines) == longest or not line.strip()):
                number += 1
                self.position = {"byte": offset, "record": number}
                yield self._record(lines, number)
                lines = []
            behind = offset
        self.position = {"byte": behind, "record": number}
        if lines:
            yield self._record(lines, number + 1)

    def _record(self, lines: list[str], number: int) -> Record:
        return Record({"text": "".join(lines).strip("\n")}, f"{self.path} document {number}")

    def _longest(self) -> int | None:
        """Lines of a document: no bound where a blank line stands between two."""
        here, self.position = self.position, {"byte": 0, "record": 0}
        begun = ended = False
        try:
            for line, _ in self._lines():
                blank = not line.strip()
                if ended and not blank:
                    return None
                begun, ended = begun or not blank, begun and blank
        finally:
            self.position = here
        return LINES_PER_PIECE


class Rows(_File):
    """Rows of a parquet file."""

    COUNTS = ("row",)

    def records(self) -> Iterator[Record]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                first = 0
                for group in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if first + rows > self.position["row"]:
                        yield from self._group(file, group, first)
                    first += rows
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path}: not a readable parquet file ({str(error).splitlines()[0]})") from None

    def _group(self, file: Any, group: int, row: int) -> Iterator[Record]:
        for batch in file.iter_batches(ROWS, row_groups=[group]):
            skipped = min(max(0, self.position["row"] - row), len(batch))
            row += skipped
            for content in batch.slice(skipped).to_pylist():
                row += 1
                self.position = {"row": row}
                yield Record(without_nulls(content), f"{self.path} row {row}")


class Streamed:
    """A dataset by name or folder, through datasets' streaming."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position: dict[str, Any] = {"row": 0, "dataset": None}

    def identity(self) -> str:
        """What datasets knows its files by: names, sizes, times or etags."""
        builder = self._loaded("load_dataset_builder")
        return f"{builder.config_id} {builder.hash} {self.source.split}"

    def _loaded(self, how: str, **options: Any) -> Any:
        import datasets

        try:
            return getattr(datasets, how)(self.source.path, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.source.path}: neither a file nor a dataset that can be loaded ({reason})") from None

    def records(self) -> Iterator[Record]:
        rows = self._loaded("load_dataset", split=self.source.split or "train", streaming=True)
        if self.position["dataset"] is not None:
            rows.load_state_dict(copy.deepcopy(self.position["dataset"]))
        number = self.position["row"]
        for content in rows:
            number += 1
            self.position = {"row": number, "dataset": rows.state_dict()}
            yield Record(without_nulls(content), f"{self.source.path} row {number}")
