"""Read the records of a source, all at once, or one by one from a position at which reading can resume exactly.

A position is a small JSON-like dict. It holds a byte offset of a text file or a row of a parquet file, with the number of the file among
several, or the state of a streamed dataset, as datasets has it. That state is exact without datasets' shuffle buffer, which is lost on
resume, so data/stream.py does the shuffling.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from adept_fast.data.file_readers import file_reader, without_nulls
from adept_fast.data.source_files import source_files
from adept_fast.data.sources import Record, Source
from adept_fast.errors import InputError
from adept_fast.runtime.optional_packages import optional
from adept_fast.runtime.provenance import digest

HUB_TIMEOUT = 5.0  # seconds
UNREADABLE = (OSError, ValueError, LookupError, RuntimeError)  # what datasets raises for data that it cannot load


class Reader(Protocol):
    """A reader with a position. `records` yields from `position` to the end of the source, and keeps `position` behind the last record."""

    position: dict[str, Any]

    def records(self) -> Iterator[Record]: ...

    def identity(self) -> str: ...


def read(source: Source) -> list[Record]:
    """Read all records of a source, in order. Raises InputError with file and line for a malformed file, and for an empty source."""
    files = source_files(source)
    if files is None:
        rows = _dataset(source, "load_dataset", split=source.split or "train")
        records = [_of_row(row, source, number) for number, row in enumerate(rows, 1)]
    else:
        records = list(reader(source).records())
    if not records:
        raise InputError(f"{source.path}: holds no records")
    return records


def reader(source: Source) -> Reader:
    """Return the reader of a source, at its start."""
    files = source_files(source)
    if files is None:
        return Streamed(source)
    return file_reader(files.files[0], source) if len(files.files) == 1 else Files(source, files.files)


class Files:
    """The files of a folder or a glob, one after another."""

    def __init__(self, source: Source, files: tuple[Path, ...]) -> None:
        self.source, self.files = source, files
        self.position: dict[str, Any] = {"file": 0, "within": None}

    def records(self) -> Iterator[Record]:
        within = self.position["within"]
        for number in range(self.position["file"], len(self.files)):
            reader = file_reader(self.files[number], self.source, alone=False)
            if within is not None:
                reader.position = dict(within)
            for record in reader.records():
                self.position = {"file": number, "within": reader.position}
                yield record
            within = None

    def identity(self) -> str:
        """Hash the files' contents and endings, in their order. The endings say how a file is read; the rest of a name does not matter."""
        return digest([[file.name.partition(".")[2], file_reader(file, self.source).identity()] for file in self.files])


def _dataset_id(path: str) -> str:
    """Return what identifies a dataset's files to datasets: names, sizes, times or etags."""
    builder = _dataset(Source(path), "load_dataset_builder")
    return f"{builder.config_id} {builder.hash}"


_remote_dataset_id = lru_cache(None)(_dataset_id)


@contextmanager
def _refused(what: str, way_out: str = "") -> Iterator[None]:
    """Turn exceptions of datasets into an InputError."""
    import datasets

    try:
        yield
    except (*UNREADABLE, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{what} ({reason}){way_out}") from None


def _dataset(source: Source, how: str, **options: Any) -> Any:
    datasets = optional("datasets", "hf", f"{source.path}: no such file, and a dataset of that name")
    with _refused(f"{source.path}: neither a file nor a dataset that can be loaded", _near(source.path)):
        if os.path.isdir(source.file) or _hub_answers(source.path):
            return getattr(datasets, how)(source.path, **options)
        with _offline():
            try:
                return getattr(datasets, how)(source.path, **options)
            except ConnectionError:
                raise ConnectionError("the hub cannot be reached, and the cache has no such dataset") from None


def _hub_answers(name: str) -> bool:
    """Ask the hub for a dataset, once. datasets asks six times, with pauses of 23 seconds together, before it looks into its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):  # an answer, or a name that the hub does not take: datasets says it better
        return True
    except Exception:  # of the HTTP client, which differs between releases of huggingface_hub; also where HF_HUB_OFFLINE is set
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Let datasets look into its cache alone."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _near(path: str) -> str:
    """Ask for a file or folder with a similar name, for a name that was mistyped."""
    folder, name = os.path.split(path)
    try:
        found = get_close_matches(name, {*os.listdir(folder or ".")} - {name}, 1)
    except OSError:
        return ""
    return f": did you mean {os.path.join(folder, found[0])}?" if found else ""


def _of_row(row: Any, source: Source, number: int) -> Record:
    content, nulls = without_nulls(row)
    return Record(content, f"{source.path} row {number}", source.column, source.template, nulls)


class Streamed:
    """A dataset, by name or folder, streamed by datasets."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position: dict[str, Any] = {"row": 0, "dataset": None}

    def identity(self) -> str:
        """Return what identifies the dataset's files, and the split."""
        found = _dataset_id(self.source.path) if os.path.isdir(self.source.file) else _remote_dataset_id(self.source.path)
        return f"{found} {self.source.split}"

    def records(self) -> Iterator[Record]:
        rows = _dataset(self.source, "load_dataset", split=self.source.split or "train", streaming=True)
        if self.position["dataset"] is not None:
            rows.load_state_dict(copy.deepcopy(self.position["dataset"]))
        number, ahead = self.position["row"], iter(rows)
        while True:
            with _refused(f"{self.source.path}: cannot be read behind row {number:,}", ": repair it, and the same command goes on"):
                content = next(ahead, None)  # raises at a truncated file, for example
            if content is None:
                return
            number += 1
            self.position = {"row": number, "dataset": rows.state_dict()}
            yield _of_row(content, self.source, number)
