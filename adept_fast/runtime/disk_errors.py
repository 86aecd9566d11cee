"""What a disk or a limit of the system refuses, told in a line with the file and the way out."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adept_fast.errors import InputError

OF_RUST = re.compile(r"\(os error (\d+)\)")  # in messages of safetensors
OF_TORCH = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs|iostream error")  # of torch.save
UNKNOWN = 0  # the errno that torch.save does not keep
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
    errno.ENOENT: "it, or its folder, was removed meanwhile: put it back",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ESTALE: "mount its file system again",
    UNKNOWN: "make room on its disk, or check it",
}


class DiskError(OSError):
    """An OSError whose text is the whole line that a user needs."""

    def __str__(self) -> str:
        return str(self.args[1])


def number_of(error: BaseException) -> int | None:
    """The errno that an exception stands for, whatever library raised it; None for one that stands for none."""
    if isinstance(error, OSError):
        return error.errno
    if found := OF_RUST.search(str(error)):
        return int(found[1])
    return UNKNOWN if OF_TORCH.search(str(error)) else None


def told(path: object, number: int) -> str:
    """One line: the file, what the system said, the way out."""
    what = os.strerror(number) if number != UNKNOWN else "could not be written"
    return f"{path}: {what}: {REMEDIES.get(number, 'see that it can be written')}, then the same command goes on"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what is refused while `path` is written be a DiskError that names it. An error that names a file neither `path` nor beneath
    its folder, which was read then, stays as it is."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        number, named = number_of(error), getattr(error, "filename", None)
        if number is None or (named is not None and not isinstance(error, DiskError) and not _beneath(named, path.parent)):
            raise
        raise DiskError(number, told(path, number)) from error


def _beneath(file: object, folder: Path) -> bool:
    return isinstance(file, str | os.PathLike) and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))
