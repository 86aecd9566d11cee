"""Errors of the disk and limits of the system as one line with the file and the remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adept_fast.errors import InputError

SAFETENSORS_ERROR = re.compile(r"\(os error (\d+)\)")
TORCH_SAVE_ERROR = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs|iostream error")
UNKNOWN = 0  # torch.save does not report the errno
REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files of other programs, or raise the system's limit on open files",
    errno.EACCES: "give yourself the permission",
    errno.EPERM: "give yourself the permission",
    errno.EROFS: "make its file system writable, or write elsewhere",
    errno.EIO: "check its disk",
    errno.ENOENT: "it, or its folder, was removed in the meantime: put it back",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ESTALE: "mount its file system again",
    UNKNOWN: "make room on its disk, or check it",
}


class DiskError(OSError):
    """An OSError whose text is the complete line for the user."""

    def __str__(self) -> str:
        return str(self.args[1])


def errno_of(error: BaseException) -> int | None:
    """Return the errno of an exception of Python, safetensors or torch.save; None if it is no error of the system."""
    if isinstance(error, OSError):
        return error.errno
    if found := SAFETENSORS_ERROR.search(str(error)):
        return int(found[1])
    return UNKNOWN if TORCH_SAVE_ERROR.search(str(error)) else None


def disk_error_line(path: object, number: int) -> str:
    """Format the file, the system's message and the remedy as one line."""
    what = os.strerror(number) if number != UNKNOWN else "could not be written"
    return f"{path}: {what}: {REMEDIES.get(number, 'see that it can be written')}, then the same command goes on"


@contextmanager
def as_disk_error(path: Path) -> Iterator[None]:
    """Convert errors of the disk, raised while `path` is written, to a DiskError that names it.

    An error about a file outside of the folder of `path` was raised by reading, and is passed on.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number, named = errno_of(error), getattr(error, "filename", None)
        if number is None or (named is not None and not isinstance(error, DiskError) and not _beneath(named, path.parent)):
            raise
        raise DiskError(number, disk_error_line(path, number)) from error


def _beneath(file: object, folder: Path) -> bool:
    return isinstance(file, str | os.PathLike) and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))
