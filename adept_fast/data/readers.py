"""Readers of sources: records one after another, all at once or from a position from which reading goes on exactly.

A position is a small JSON-like dict: a byte offset of a text file, a row of a parquet file, datasets' own state of a streamed dataset
(exact without datasets' shuffle buffer, which is lost on resume; shuffling is data/stream.py's).
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from adept_fast.data.sources import Record, Source, kind_of
from adept_fast.errors import InputError
from adept_fast.runtime.input_files import open_input, regular

LINES_PER_PIECE = 20  # a text without blank lines is cut into pieces of so many lines, so that some can be held out
ROWS = 1024  # of a parquet file read at once
UNREADABLE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)
BUFFER = 1 << 24


class Reader(Protocol):
    """`records` goes on from `position` to the end of the source; `position` is always behind the last record that it gave."""

    position: dict[str, Any]

    def records(self) -> Iterator[Record]: ...

    def identity(self) -> str: ...


def read(source: Source) -> list[Record]:
    """All records of a source, in file order. Raises InputError naming file and line; an empty source is an error too."""
    kind = kind_of(source)
    if kind is None:
        rows = _dataset(source, "load_dataset", split=source.split or "train")
        records = [Record(_without_nulls(row), f"{source.path} row {number}") for number, row in enumerate(rows, 1)]
    else:
        records = _array(source.file) if kind == ".json" else list(reader(source).records())
    if not records:
        raise InputError(f"{source.path}: holds no records")
    return records


def reader(source: Source) -> Reader:
    """The reader of a source, at its beginning. Raises InputError for a source that cannot be streamed."""
    kind, path = kind_of(source), source.file
    if kind is None:
        return Streamed(source)
    if kind == ".json":
        raise InputError(f"{path}: a JSON array cannot be streamed: write one object a line (.jsonl), or set tune.streaming=false")
    return {".jsonl": Lines, ".txt": Paragraphs, ".parquet": Rows}[kind](path)


def _opened(path: Path) -> BinaryIO:
    return gzip.open(regular(path)) if path.name.endswith(".gz") else open_input(path)


def _array(path: Path) -> list[Record]:
    """The objects of a JSON array."""
    try:
        with _opened(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); for one object a line use .jsonl") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:  # numbers beyond what Python reads, too deeply nested
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a JSON array of objects; for one object a line use .jsonl")
    return [Record(row, f"{path} item {number}") for number, row in enumerate(rows, 1)]


def _dataset(source: Source, how: str, **options: Any) -> Any:
    import datasets

    try:
        return getattr(datasets, how)(source.path, **options)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{source.path}: neither a file nor a dataset that can be loaded ({reason})") from None


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tables give every row every column: what a row does not have is null there."""
    return {key: value for key, value in row.items() if value is not None}


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.position: dict[str, Any] = dict.fromkeys(self.COUNTS, 0)

    COUNTS: tuple[str, ...] = ("byte", "record")

    def identity(self) -> str:
        """sha256 of the file."""
        with open_input(self.path) as file:
            digest = hashlib.sha256()
            while part := file.read(BUFFER):
                digest.update(part)
            return digest.hexdigest()

    def _lines(self) -> Iterator[tuple[str, int]]:
        """Lines from the position on, and the offset behind each."""
        try:
            with _opened(self.path) as file:
                file.seek(self.position["byte"])
                encoding = "utf-8" if self.position["byte"] else "utf-8-sig"
                while line := file.readline():
                    yield line.decode(encoding), file.tell()
                    encoding = "utf-8"
        except UNREADABLE as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None


class Lines(_File):
    """One JSON object a line."""

    def records(self) -> Iterator[Record]:
        number = self.position["record"]
        for line, behind in self._lines():
            number += 1
            where = f"{self.path}:{number}"
            content = _parsed(line, where) if line.strip() else None
            self.position = {"byte": behind, "record": number}
            if content is not None:
                yield Record(content, where)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


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
            with ParquetFile(regular(self.path)) as file:
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
                yield Record(_without_nulls(content), f"{self.path} row {row}")


class Streamed:
    """A dataset by name or folder, through datasets' streaming."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position: dict[str, Any] = {"row": 0, "dataset": None}

    def identity(self) -> str:
        """What datasets knows its files by: names, sizes, times or etags."""
        builder = _dataset(self.source, "load_dataset_builder")
        return f"{builder.config_id} {builder.hash} {self.source.split}"

    def records(self) -> Iterator[Record]:
        rows = _dataset(self.source, "load_dataset", split=self.source.split or "train", streaming=True)
        if self.position["dataset"] is not None:
            rows.load_state_dict(copy.deepcopy(self.position["dataset"]))
        number = self.position["row"]
        for content in rows:
            number += 1
            self.position = {"row": number, "dataset": rows.state_dict()}
            yield Record(_without_nulls(content), f"{self.source.path} row {number}")
