"""Staging folders: an artefact is written to one, beside its final name, until it is complete.

The name is random in a reserved form, and the process holds a lock inside. So leftovers of killed processes are distinguished from folders
that another process is writing to, and from files of the user.
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
    """Yield a new folder in `parent`, and delete it with its content at the end. Deletes leftovers of killed processes first."""
    remove_leftovers(parent)
    folder, lock = _made(parent)
    try:
        yield folder
    finally:
        with suppress(OSError):  # the next call removes it
            _remove(folder)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Delete the staging folders of ended processes in `parent`. Folders that cannot be deleted are ignored."""
    with os.scandir(parent) as entries:
        folders = [entry.path for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    for folder in map(Path, folders):
        with suppress(OSError):
            _remove_where_left(folder)


def modes(folder: Path) -> tuple[int, int]:
    """Return the permissions that the umask gives to files and to folders, read from a staging folder."""
    return os.stat(folder / LOCK).st_mode & 0o7777, os.stat(folder).st_mode & 0o7777


def locked(descriptor: int) -> bool | None:
    """Try to lock a file. Returns False if another process holds the lock, None if the file system has no locks."""
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
        except FileNotFoundError:  # deleted as a leftover before it was locked
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
    except FileNotFoundError:  # its process was killed before it made the lock, or after it removed it
        folder.rmdir()
        return
    try:
        if locked(lock):
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Delete the folder, the lock last, because it marks the folder as ours."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()
