"""Files that somebody gave: only regular ones are opened, records up to a bound, and whatever is wrong with one names it."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adept_fast.errors import InputError
from adept_fast.runtime.strict_json import loads
from adept_fast.runtime.yaml_text import parsed

LARGEST_RECIPE = 1 << 20  # bytes; the longest in use has some thousands
LARGEST_RECORD = 1 << 28  # bytes of a JSON record; the index of a checkpoint of a million tensors has 100 MB
GIVEN_WRONG = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "no such file: its name is too long",
    errno.ELOOP: "a link that leads to itself",
    errno.EACCES: "you have no permission to read it",
    errno.EPERM: "you have no permission to read it",
}
KINDS = (
    *((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")),
)


def open_input(path: str | Path) -> BinaryIO:
    """Open a file for reading in binary; links are followed.

    Raises InputError for one that is missing, may not be read, or is no regular file: a pipe could wait, a device go on, for ever. What
    the machine does not allow (too many open files, a failing disk) stays an OSError.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # should it have become a pipe since then
        try:
            _require_regular(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        if error.errno not in GIVEN_WRONG:
            raise
        raise InputError(f"{_one_line(path)}: {GIVEN_WRONG[error.errno]}") from None
    except InputError:
        raise
    except ValueError:  # a NUL or half a character in the name
        raise InputError(f"{_one_line(path)}: no such file") from None


def regular(path: str | Path) -> Path:
    """The path of a file that others are to open. Raises InputError where open_input does."""
    open_input(path).close()
    return Path(path)


def _require_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "no file")
        raise InputError(f"{_one_line(path)}: {kind}, not a regular file: give a file that can be read more than once")


def _one_line(path: str | Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)


def read_text(path: str | Path, largest: int = LARGEST_RECORD) -> str:
    """The text of a file in UTF-8. Raises InputError for other bytes, or more than `largest` of them."""
    with open_input(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise InputError(f"{path}: more than {largest:,} bytes, which is no such file as is expected here")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not a text in UTF-8 (byte {content[error.start]:#04x}): save it as UTF-8") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; a missing or malformed file is an InputError that names it (and the line). No key stands there twice."""

    text = read_text(path)
    try:
        content = loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}): restore it or delete it to make it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}: restore it or delete it to make it again")
    return content


@contextmanager
def making_sense(path: str | Path, remedy: str) -> Iterator[None]:
    """What a record's content breaks, while sense is made of it, is an InputError that names the file and the way out.

    For reading and drawing alone: neither training nor writing goes on in it, so that no fault of theirs is taken for one of the file.
    """
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}: {remedy}") from error
    except _of_content() as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: not as it was written ({reason[:200]}): {remedy}") from error


def _of_content() -> tuple[type[Exception], ...]:
    """What wrong content raises in Python, and in readers of safetensors files, templates of pages and configs where they are loaded."""
    loaded = (
        (sys.modules.get("safetensors"), "SafetensorError"),
        (sys.modules.get("jinja2"), "TemplateError"),
        (sys.modules.get("huggingface_hub.errors"), "StrictDataclassError"),
    )
    plain = LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
    return (*plain, *(getattr(module, name) for module, name in loaded if module is not None))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The same for YAML, as recipe.yaml is kept in."""
    content = parsed(read_text(path, LARGEST_RECIPE), f"{path}:")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}: restore it")
    return content
