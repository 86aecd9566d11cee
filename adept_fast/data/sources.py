"""Where records come from: .jsonl, .json, .parquet, .txt (each but parquet also gzipped), a datasets name, or the bundled probe."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from adept_fast.errors import InputError

GENERAL = "general"  # the name of the bundled general probe
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
LINES_PER_PIECE = 20  # a text without blank lines is cut into pieces of so many lines, so that some can be held out


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


@dataclass(frozen=True)
class Record:
    """One row of a source, and where it stands there ("file.jsonl:12"), for messages."""

    content: Mapping[str, Any]
    where: str


def read(source: Source) -> list[Record]:
    """All records of a source, in file order. Raises InputError naming file and line; an empty source is an error too."""
    records = list(_records(source))
    if not records:
        raise InputError(f"{source.path}: holds no records")
    return records


def _records(source: Source) -> Iterator[Record]:
    if source.path == GENERAL:
        text = (resources.files("adept_fast") / "data" / "general_probe.jsonl").read_text(encoding="utf-8")
        yield from _json_lines(text.splitlines(), GENERAL)
        return
    path, kind = Path(source.path).expanduser(), kind_of(source)
    if kind is None:
        yield from _dataset(source)
        return
    if kind == ".parquet":
        yield from _parquet(path)
        return
    try:
        with _open(path) as file:
            if kind == ".jsonl":
                yield from _json_lines(file, str(path))
            elif kind == ".json":
                yield from _json_array(file, str(path))
            else:
                yield from _text(file.read(), str(path))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def kind_of(source: Source) -> str | None:
    """The kind of a file, one of SUFFIXES; None for what datasets is to load. Raises InputError for a missing or unknown file."""
    path = Path(source.path).expanduser()
    kind = next((suffix for suffix in SUFFIXES if path.name.removesuffix(".gz").endswith(suffix)), None)
    if kind is None and path.is_file():
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)} (.gz too), or a datasets name")
    if kind is None or path.is_dir():
        return None
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return kind


def _open(path: Path) -> TextIO:
    as_it_is = {"encoding": "utf-8-sig", "newline": "\n"}
    return gzip.open(path, "rt", **as_it_is) if path.name.endswith(".gz") else path.open(**as_it_is)


def _json_lines(lines: Iterator[str] | list[str] | TextIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        record = parse_line(line, f"{name}:{number}")
        if record is not None:
            yield record


def parse_line(line: str, where: str) -> Record | None:
    """The record of a line of JSON; None for a blank one."""
    if not line.strip():
        return None
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers beyond what Python reads, too deeply nested
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return Record(content, where)


def _json_array(file: TextIO, name: str) -> Iterator[Record]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}: not valid JSON ({error.msg}); for one object a line use .jsonl") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name}: expected a JSON array of objects; for one object a line use .jsonl")
    for number, row in enumerate(rows, 1):
        yield Record(row, f"{name} item {number}")


def _text(text: str, name: str) -> Iterator[Record]:
    documents: list[list[str]] = [[]]
    for line in text.replace("\r\n", "\n").split("\n"):
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    documents = [lines for lines in documents if lines]
    if len(documents) == 1:
        lines = documents[0]
        documents = [lines[start : start + LINES_PER_PIECE] for start in range(0, len(lines), LINES_PER_PIECE)]
    for number, lines in enumerate(documents, 1):
        yield Record({"text": "\n".join(lines)}, f"{name} document {number}")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield Record(without_nulls(row), f"{path} row {number}")


def _dataset(source: Source) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source.path}: neither a file nor a dataset that can be loaded ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield Record(without_nulls(row), f"{source.path} row {number}")


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tables give every row every column: what a row does not have is null there."""
    return {key: value for key, value in row.items() if value is not None}
