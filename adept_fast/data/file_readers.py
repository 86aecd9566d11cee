"""Readers of one file each, by its ending: lines of JSON, a JSON array, rows of parquet, texts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from adept_fast.data.source_files import suffix_of
from adept_fast.data.sources import Record, Source
from adept_fast.errors import InputError
from adept_fast.runtime.input_files import open_input, regular

ROWS = 1024  # of a parquet file read at once
UNREADABLE = (EOFError, gzip.BadGzipFile, zlib.error)
BUFFER = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def file_reader(path: Path, source: Source, alone: bool = True) -> FileReader:
    """The reader of a file of `source`, at its beginning. alone: whether it is the source's only file."""
    from adept_fast.data.text_readers import Markdown, Paragraphs

    kinds: dict[str | None, type[FileReader]] = {".jsonl": Lines, ".json": Array, ".parquet": Rows, ".txt": Paragraphs, ".md": Markdown}
    return kinds[suffix_of(path)](path, source, alone)


class FileReader:
    """`records` goes on from `position` to the end of the file; `position` is always behind the last record that it gave."""

    COUNTS: tuple[str, ...] = ("byte", "record")

    def __init__(self, path: Path, source: Source, alone: bool = True) -> None:
        self.path, self.source, self.alone = path, source, alone
        self.position: dict[str, Any] = dict.fromkeys(self.COUNTS, 0)

    def records(self) -> Iterator[Record]:
        raise NotImplementedError

    def identity(self) -> str:
        """sha256 of the file, read once for as long as it stays as it is."""
        with open_input(self.path) as file:
            found = os.fstat(file.fileno())
            return _sha256(self.path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))

    def _record(self, content: Any, where: str, fault: str | None = None, nulls: frozenset[str] = frozenset()) -> Record:
        return Record(content, where, self.source.column, self.source.template, nulls, fault)

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Lines from the position on, and the offset behind each."""
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
    """Of a file in that state."""
    with open_input(path) as file:
        digest = hashlib.sha256()
        while part := file.read(BUFFER):
            digest.update(part)
        return digest.hexdigest()


def opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(regular(path)) if path.name.lower().endswith(".gz") else open_input(path)


class Lines(FileReader):
    """One JSON object a line."""

    def records(self) -> Iterator[Record]:
        number = self.position["record"]
        for line, behind in self._lines():
            number += 1
            self.position = {"byte": behind, "record": number}
            if line.strip():
                content, fault = _parsed(line)
                yield self._record(content, f"{self.path}:{number}", fault)


def _parsed(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    """The object that a line holds, or what is wrong with the line."""
    try:
        content = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return {}, undecodable(line, error)
    except json.JSONDecodeError as error:
        return {}, f"not valid JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # keys given twice, numbers beyond what Python reads, too deeply nested
        return {}, f"not valid JSON ({error})"
    return (content, None) if isinstance(content, dict) else ({}, f"expected a JSON object, found {type(content).__name__}")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is given twice json would keep the last value, in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in content if keys.count(key) > 1)!r} twice in one object")
    return content


def undecodable(line: bytes, error: UnicodeDecodeError) -> str:
    return _not_utf8(line[error.start], error.start + 1)


def _not_utf8(byte: int, column: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x} at column {column}): save the file as UTF-8 (iconv -f CP1252 -t UTF-8, say)"


class Array(FileReader):
    """The objects of a JSON array, read whole when its turn comes; a file among several may be one object, too."""

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
            rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise InputError(f"{self.path}:{error.lineno}: not valid JSON ({error.msg}); for one object a line use .jsonl") from None
        except UnicodeDecodeError as error:
            before = content[: error.start]
            line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
            raise InputError(f"{self.path}:{line}: {_not_utf8(content[error.start], column)}") from None
        except UNREADABLE as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: not valid JSON ({error})") from None
        if isinstance(rows, dict) and not self.alone:
            return [rows]
        if not isinstance(rows, list):
            raise InputError(f"{self.path}: expected a JSON array of objects; for one object a line use .jsonl")
        return rows


class Rows(FileReader):
    """Rows of a parquet file. A column that a row leaves null is not among its content, but among its nulls."""

    COUNTS = ("row",)

    def records(self) -> Iterator[Record]:
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
                kept, nulls = without_nulls(content)
                yield self._record(kept, f"{self.path} row {row}", fault, nulls)


def _rows(batch: Any) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Rows of a batch; where a text in it is not UTF-8, one by one."""
    try:
        yield from [(content, None) for content in batch.to_pylist()]
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield batch.slice(number, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield {}, f"a text is not UTF-8 ({error.reason})"


def without_nulls(row: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Tables give every row every column: (what a row has, the columns that it leaves null)."""
    return {key: value for key, value in row.items() if value is not None}, frozenset(key for key, value in row.items() if value is None)
