"""Artefacts on disk: written in a staging folder beside their final name, fsynced, renamed. A half-written one is never found by name.

A name that is a symbolic link is replaced, not followed. Files and folders get the permissions that the umask gives.
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
from adept_fast.runtime.disk_errors import naming
from adept_fast.runtime.staging_folder import modes, staging_folder
from adept_fast.runtime.strict_json import dumps

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path` atomically, on an error it is removed and `path` stays as it was.

    Raises InputError where `path` is a folder, and DiskError, which names it, for what the disk refuses.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"{path}: a folder, where a file is to be written: move it away, or write elsewhere")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(path.parent) as folder:
            staging = folder / path.name
            yield staging
            staging.chmod(modes(folder)[0])  # safetensors writes files that their owner alone can read
            _sync(staging)
            os.replace(staging, path)
            _sync(path.parent)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, in one that exists. An existing `path` is an error: nothing is overwritten."""
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path} exists already: remove it or choose another output_dir")
    with naming(path), staging_folder(path.parent) as folder:
        staging = folder / path.name
        staging.mkdir()
        yield staging
        file_mode, folder_mode = modes(folder)
        for entry in (*staging.rglob("*"), staging):
            entry.chmod(folder_mode if entry.is_dir() else file_mode)
            _sync(entry)
        try:
            os.rename(staging, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise InputError(f"{path} was made by another process meanwhile: remove it or choose another output_dir") from None
        _sync(path.parent)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a path of the same name to write a folder to; on success it takes the place of `path`, which stays as it was until then."""
    path = Path(path)
    with naming(path), staging_folder(path.parent) as aside:
        new = aside / path.name
        yield new
        if os.path.lexists(path) and not _exchange(new, path):
            os.rename(path, aside / f"earlier-{path.name}")
            os.rename(new, path)
        elif not os.path.lexists(path):
            os.rename(new, path)
        _sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths trade what they name, in one step; False where system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def discard(path: Path) -> None:
    """Delete a folder: by its own name it is whole or gone."""
    with naming(path), staging_folder(path.parent) as leaving:
        os.rename(path, leaving / path.name)


def write_text(path: Path, text: str) -> None:
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, dumps(content, indent=1) + "\n")
