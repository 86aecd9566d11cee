"""A folder of this process's own, beside where an artefact is to stand, in which it is written until it is whole.

Its name is random, in a form that nothing else has, and its process holds a lock in it. So what a killed process left is told from what
another one is writing, and from the files of anybody else.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = re.compile(r"\.adept_fast-[0-9a-f]{16}\.partial")
LOCK = ".adept_fast.lock"


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is deleted afterwards with all that is left in it. What killed processes left goes first."""
    remove_leftovers(parent)
    folder, lock = _made(parent)
    try:
        yield folder
    finally:
        with suppress(OSError):  # the next one removes it
            _remove(folder)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Delete the staging folders in `parent` whose processes have ended; one that cannot be deleted stays."""
    with os.scandir(parent) as entries:
        folders = [entry.path for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    for folder in map(Path, folders):
        with suppress(OSError):
            _remove_where_left(folder)


def modes(folder: Path) -> tuple[int, int]:
    """The permissions that the umask gives to a file and to a folder, as those of this staging folder have them."""
    return os.stat(folder / LOCK).st_mode & 0o7777, os.stat(folder).st_mode & 0o7777


def locked(descriptor: int) -> bool | None:
    """Whether the file could be locked: False where another process has it, None where its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _made(parent: Path) -> tuple[Path, int]:
    while True:
        folder = parent / f".adept_fast-{secrets.token_hex(8)}.partial"
        folder.mkdir()
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # taken for a leftover, in the moment before it was locked
            continue
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            raise
        if locked(lock) is not False and os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


def _remove_where_left(folder: Path) -> None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # killed before there was a lock, or when all but the folder was gone
        folder.rmdir()
        return
    try:
        if locked(lock):
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """The lock goes last: while it stands what is left can be told for what it is."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()
