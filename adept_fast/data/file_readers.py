"""Read the records of one file, by its ending: lines of JSON, a JSON array, rows of parquet, texts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from adept_fast.data.source_files import suffix_of
from adept_fast.data.sources import Record, Source
from adept_fast.errors import InputError
from adept_fast.runtime.input_files import open_input, regular
from adept_fast.runtime.optional_packages import optional
from adept_fast.runtime.strict_json import loads

ROWS = 1024  # of a parquet file read at once
UNREADABLE = (EOFError, gzip.BadGzipFile, zlib.error)
BUFFER = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def file_reader(path: Path, source: Source, alone: bool = True) -> FileReader:
    """Return the reader of a file of `source`, at its start. alone: whether it is the source's only file."""
    from adept_fast.data.text_readers import Markdown, Paragraphs

    kinds: dict[str | None, type[FileReader]] = {".jsonl": Lines, ".json": Array, ".parquet": Rows, ".txt": Paragraphs, ".md": Markdown}
    return kinds[suffix_of(path)](path, source, alone)


class FileReader:
    """A reader with a position. `records` yields from `position` to the end of the file, and keeps `position` behind the last record."""

    COUNTS: tuple[str, ...] = ("byte", "record")

    def __init__(self, path: Path, source: Source, alone: bool = True) -> None:
        self.path, self.source, self.alone = path, source, alone
        self.position: dict[str, Any] = dict.fromkeys(self.COUNTS, 0)

    def records(self) -> Iterator[Record]:
        raise NotImplementedError

    def identity(self) -> str:
        """Return the sha256 of the file, computed again only after the file has changed."""
        with open_input(self.path) as file:
            found = os.fstat(file.fileno())
            return _sha256(self.path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))

    def _record(self, content: Any, where: str, fault: str | None = None, nulls: frozenset[str] = frozenset()) -> Record:
        return Record(content, where, self.source.column, self.source.template, nulls, fault)

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Yield the lines from the position on, and the byte offset behind each."""
        at = self.position["byte"]
        try:
            with opened(self.path) as file:
                file.seek(at)
                while line := file.readline():
                    yield (line if at else line.removeprefix(BYTE_ORDER_MARK)), file.tell()
                    at = 1
        except UNREADABLE as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None


@lru_cache(None)
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    """Hash a file. state: identifies its version, for the cache."""
    with open_input(path) as file:
        digest = hashlib.sha256()
        while part := file.read(BUFFER):
            digest.update(part)
        return digest.hexdigest()


def opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(regular(path)) if path.name.lower().endswith(".gz") else open_input(path)


class Lines(FileReader):
    """One JSON object per line."""

    def records(self) -> Iterator[Record]:
        number = self.position["record"]
        for line, behind in self._lines():
            number += 1
            self.position = {"byte": behind, "record": number}
            if line.strip():
                content, fault = _parsed(line)
                yield self._record(content, f"{self.path}:{number}", fault)


def _parsed(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    """Return the object of a line, and what is wrong with the line, if anything."""
    try:
        content = loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, undecodable(line, error)
    except json.JSONDecodeError as error:
        return {}, f"not valid JSON ({error.msg} at column {error.colno})"
    except ValueError as error:
        return {}, f"not valid JSON ({error})"
    return (content, None) if isinstance(content, dict) else ({}, f"expected a JSON object, found {type(content).__name__}")


def undecodable(line: bytes, error: UnicodeDecodeError) -> str:
    return _not_utf8(line[error.start], error.start + 1)


def _not_utf8(byte: int, column: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x} at column {column}): save the file as UTF-8 (iconv -f CP1252 -t UTF-8, say)"


class Array(FileReader):
    """The objects of a JSON array. The file is read as a whole; one of several files may also hold a single object."""

    COUNTS = ("record",)

    def records(self) -> Iterator[Record]:
        rows = self._rows()
        for number in range(self.position["record"], len(rows)):
            content, self.position = rows[number], {"record": number + 1}
            fault = None if isinstance(content, dict) else f"expected a JSON object, found {type(content).__name__}"
            yield self._record({} if fault else content, f"{self.path} item {number + 1}", fault)

    def _rows(self) -> list[Any]:
        try:
            with opened(self.path) as file:
                content = file.read()
            rows = loads(content.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.path}:{error.lineno}: not valid JSON ({error.msg}); for one object a line use .jsonl") from None
        except UnicodeDecodeError as error:
            before = content[: error.start]
            line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
            raise InputError(f"{self.path}:{line}: {_not_utf8(content[error.start], column)}") from None
        except UNREADABLE as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None
        except ValueError as error:
            raise InputError(f"{self.path}: not valid JSON ({error})") from None
        if isinstance(rows, dict) and not self.alone:
            return [rows]
        if not isinstance(rows, list):
            raise InputError(f"{self.path}: expected a JSON array of objects; for one object a line use .jsonl")
        return rows


class Rows(FileReader):
    """Rows of a parquet file. The null columns of a row are not in its content, but in its nulls."""

    COUNTS = ("row",)

    def records(self) -> Iterator[Record]:
        optional("pyarrow", "hf", f"{self.path}: a parquet file")
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(regular(self.path)) as file:
                names = file.schema_arrow.names
                if twice := [name for name in names if names.count(name) > 1]:
                    raise InputError(f"{self.path}: the column {twice[0]!r} stands there twice")
                first = 0
                for group in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if first + rows > self.position["row"]:
                        yield from self._group(file, group, first)
                    first += rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: not a readable parquet file ({str(error).partition(chr(10))[0]})") from None

    def _group(self, file: Any, group: int, row: int) -> Iterator[Record]:
        for batch in file.iter_batches(ROWS, row_groups=[group]):
            skipped = min(max(0, self.position["row"] - row), len(batch))
            row += skipped
            for content, fault in _rows(batch.slice(skipped)):
                row += 1
                self.position = {"row": row}
                values, nulls = without_nulls(content)
                yield self._record(values, f"{self.path} row {row}", fault, nulls)


def _rows(batch: Any) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield the rows of a batch, one by one if a text in it is not UTF-8."""
    try:
        yield from [(content, None) for content in batch.to_pylist()]
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield {}, f"a text is not UTF-8 ({error.reason})"


def without_nulls(row: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Split a table row into its values and the names of its null columns."""
    return {key: value for key, value in row.items() if value is not None}, frozenset(key for key, value in row.items() if value is None)
