"""Which files a source is: one file, or those of a folder or a glob in sorted order, each to be read by the rule of its own ending."""

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
    """files: in sorted order; skipped: files of a folder whose ending none of the readers has."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def suffix_of(path: Path) -> str | None:
    """The ending that says how a file is read, one of SUFFIXES; None for any other."""
    name = path.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.removesuffix(".gz").endswith(suffix)), None)
    return None if suffix == ".parquet" and name.endswith(".gz") else suffix


def source_files(source: Source) -> SourceFiles | None:
    """The files of a source; None for what datasets is to load: a name, a folder that datasets made, or one whose `split` is asked for.

    Of a folder, and the folders in it, hidden files are none of it, and those with an ending that is not read are skipped and told. A glob
    names its files itself, so there they are refused. Raises InputError where nothing is left to read, or what is to be read is no file: a
    link whose target is gone, a pipe.
    """
    path = source.file
    if os.path.isdir(path):
        if source.split is not None or path.resolve() == Path(path.anchor or "/") or _made_by_datasets(path):
            return None
        found = _of_folder(path)
    elif os.path.isfile(path) or not glob.has_magic(source.path):
        if suffix_of(path) is None and not os.path.isfile(path):  # False for a name that is too long, too
            return None
        found = SourceFiles((path,))
    else:
        found = SourceFiles(tuple(sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not os.path.isdir(name))))
        if not found.files:
            raise InputError(f"{source.path}: matches no file")
    for file in found.files:
        if not os.path.isfile(file):
            regular(file)  # says what it is: nothing, a link to nothing, a pipe
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
    """Whether it has what datasets writes into a folder, a loading script, or the card of a dataset."""
    if any((folder / name).is_file() for name in MADE_BY_DATASETS):
        return True
    return "GeneratorBasedBuilder" in _head(folder / f"{folder.resolve().name}.py") or bool(CARD.match(_head(folder / "README.md")))


def _head(file: Path) -> str:
    """The first 64 KiB of a file; nothing where there is none."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(1 << 16).decode("utf-8", errors="replace")


def _endings(files: Iterable[Path]) -> str:
    return cut(", ".join(sorted({file.suffix or file.name for file in files})))


def told_skipped(skipped: tuple[Path, ...]) -> str:
    """In words: "3 files whose kind is not read (.pdf, .png)"; empty for none."""
    return f"{len(skipped)} file{'s' * (len(skipped) > 1)} whose kind is not read ({_endings(skipped)})" if skipped else ""


def _check_keys(source: Source, files: tuple[Path, ...]) -> None:
    """Raise InputError for a key of the source that files have no use for."""
    if source.split is not None:
        raise InputError(f"{source.path}: split={source.split}: files have no splits: name the files of one, and leave split out")
    if source.column is not None and all(suffix_of(file) in TEXTS for file in files):
        raise InputError(f"{source.path}: column={source.column}: a text has no columns: leave it out")
