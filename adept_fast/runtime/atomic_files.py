"""Atomic writes: an artefact is written to a staging folder, fsynced and renamed, so that its final name never shows a partial one.

A symbolic link at the final name is replaced, not followed. Files and folders get the permissions of the umask.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.disk_errors import as_disk_error
from adept_fast.runtime.staging_folder import modes, staging_folder
from adept_fast.runtime.strict_json import dumps

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` at the end. After an exception it is removed and `path` is unchanged.

    Raises InputError if `path` is a folder, and DiskError, which names the file, for errors of the disk.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"{path}: a folder, but a file is to be written there: move it away, or write elsewhere")
    with as_disk_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(path.parent) as folder:
            staging = folder / path.name
            yield staging
            staging.chmod(modes(folder)[0])  # safetensors writes files that only their owner can read
            _sync(staging)
            os.replace(staging, path)
            _sync(path.parent)


@contextmanager
def staged_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `path` at the end. Its parent must exist.

    replace: a folder that is there at the end. Otherwise raises InputError if `path` exists.
    """
    path = Path(path)
    if os.path.lexists(path) and not replace:
        raise InputError(f"{path} exists already: remove it or choose another output_dir")
    with as_disk_error(path), staging_folder(path.parent) as folder:
        staging = folder / path.name
        staging.mkdir()
        yield staging
        file_mode, folder_mode = modes(folder)
        for entry in (*staging.rglob("*"), staging):
            entry.chmod(folder_mode if entry.is_dir() else file_mode)
            _sync(entry)
        try:
            if replace:
                _replace(staging, path, folder)
            else:
                os.rename(staging, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise InputError(f"{path} was made by another process in the meantime: remove it or choose another output_dir") from None
        _sync(path.parent)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a path to create a folder at, which replaces `path` at the end. After an exception `path` is unchanged."""
    path = Path(path)
    with as_disk_error(path), staging_folder(path.parent) as aside:
        new = aside / path.name
        yield new
        _replace(new, path, aside)
        _sync(path.parent)


def _replace(new: Path, path: Path, aside: Path) -> None:
    """Rename `new` to `path`. What is there already comes into the folder `aside` or to the name `new`."""
    if os.path.lexists(path) and not _exchange(new, path):
        os.rename(path, aside / f"earlier-{path.name}")
        os.rename(new, path)
    elif not os.path.lexists(path):
        os.rename(new, path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically. Returns False if the system or file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def discard(path: Path) -> None:
    """Delete a folder atomically: it is renamed first, so that its name never shows a partial folder."""
    with as_disk_error(path), staging_folder(path.parent) as leaving:
        os.rename(path, leaving / path.name)


def write_text(path: Path, text: str) -> None:
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, dumps(content, indent=1) + "\n")
