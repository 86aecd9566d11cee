"""List the files of a source: one file, or those of a folder or glob, in sorted order. A file's ending says how it is read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.runtime.input_files import regular
from adept_fast.settings.validation import cut

TEXTS, TABLES = (".txt", ".md"), (".jsonl", ".json", ".parquet")
SUFFIXES = (*TABLES, *TEXTS)
READ = f"{', '.join(SUFFIXES)}, all but .parquet also with .gz"
TRAINED = re.compile(r"(?<![a-z])train(?:ing)?(?![a-z])")
OTHER_SPLIT = re.compile(r"(?<![a-z])(?:test|testing|validation|valid|val|dev|eval|evaluation)(?![a-z])")
MADE_BY_DATASETS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
CARD = re.compile(r"\A---\s*\n(?:.*\n)*?(?:configs|dataset_info|task_categories):(?:.*\n)*?---\s*$", re.MULTILINE)


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, sorted, and the files of a folder that are skipped because no reader has their ending."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def suffix_of(path: Path) -> str | None:
    """Return the ending that says how a file is read, one of SUFFIXES, or None."""
    name = path.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.removesuffix(".gz").endswith(suffix)), None)
    return None if suffix == ".parquet" and name.endswith(".gz") else suffix


def source_files(source: Source) -> SourceFiles | None:
    """List the files of a source; None if datasets is to load it: a name, a folder written by datasets, or a folder with `split`.

    A folder is searched recursively, without hidden files. Files of other endings are skipped and reported; if a glob matches them, they
    are refused. Raises InputError if no file is left, or if one is not a regular file, such as a broken link or a pipe.
    """
    path = source.file
    if os.path.isdir(path):
        if source.split is not None or path.resolve() == Path(path.anchor or "/") or _made_by_datasets(path):
            return None
        found = _of_folder(path)
    elif os.path.isfile(path) or not glob.has_magic(source.path):
        if suffix_of(path) is None and not os.path.isfile(path):  # also False for a name that is too long
            return None
        found = SourceFiles((path,))
    else:
        found = SourceFiles(tuple(sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))))
        if not found.files:
            raise InputError(f"{source.path}: matches no file")
    for file in found.files:
        if not os.path.isfile(file):
            regular(file)  # raises with the reason: missing, a broken link, a pipe
        if suffix_of(file) is None:
            raise InputError(f"{file}: unknown kind of file; use one of {READ}, or a datasets name")
    _check_keys(source, found.files)
    return found


def _of_folder(folder: Path) -> SourceFiles:
    files = sorted(_visible(folder), key=lambda file: file.relative_to(folder).parts)
    known = tuple(file for file in files if suffix_of(file) is not None)
    if not known:
        others = f"; of what it holds none is read ({_endings(files)})" if files else ""
        raise InputError(f"{folder}: an empty folder: no file ends in {READ}{others}")
    tables = [file for file in known if suffix_of(file) in TABLES]
    names = {file: "/".join(file.relative_to(folder).parts).lower() for file in tables}
    trained, other = ([file for file in tables if split.search(names[file])] for split in (TRAINED, OTHER_SPLIT))
    if trained and other:
        raise InputError(
            f"{folder}: holds a split to train on and another ({trained[0].name}, {other[0].name}): name one with split=, "
            "or its files by a glob"
        )
    return SourceFiles(known, tuple(file for file in files if suffix_of(file) is None))


def _visible(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _made_by_datasets(folder: Path) -> bool:
    """Whether a folder has files written by datasets, a loading script, or a dataset card."""
    if any((folder / name).is_file() for name in MADE_BY_DATASETS):
        return True
    return "GeneratorBasedBuilder" in _head(folder / f"{folder.resolve().name}.py") or bool(CARD.match(_head(folder / "README.md")))


def _head(file: Path) -> str:
    """Return the first 64 KiB of a file; "" if it does not exist."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(1 << 16).decode("utf-8", errors="replace")


def _endings(files: Iterable[Path]) -> str:
    return cut(", ".join(sorted({file.suffix or file.name for file in files})))


def describe_skipped(skipped: tuple[Path, ...]) -> str:
    """Describe skipped files: "3 files whose kind is not read (.pdf, .png)"; "" for none."""
    return f"{len(skipped)} file{'s' * (len(skipped) > 1)} whose kind is not read ({_endings(skipped)})" if skipped else ""


def _check_keys(source: Source, files: tuple[Path, ...]) -> None:
    """Raise InputError for a key of the source that does not apply to files."""
    if source.split is not None:
        raise InputError(f"{source.path}: split={source.split}: files have no splits: name the files of one, and leave split out")
    if source.column is not None and all(suffix_of(file) in TEXTS for file in files):
        raise InputError(f"{source.path}: column={source.column}: a text has no columns: leave it out")
