"""Opens and parses files of the user. Errors are InputErrors that name the file; only regular files of bounded size are read."""

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
from adept_fast.runtime.yaml_text import parse_yaml

LARGEST_RECIPE = 1 << 20  # bytes; recipes have some thousands
LARGEST_RECORD = 1 << 28  # bytes of a JSON file; the index of a checkpoint of a million tensors has 100 MB
USER_ERRORS = {
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
    """Open a file for binary reading. Links are followed.

    Raises InputError if it is missing, not readable or not regular: reading a pipe or device might never end. Errors of the machine (too
    many open files, a failing disk) stay OSErrors.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # in case it has become a pipe since
        try:
            _require_regular(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        raise InputError(f"{_one_line(path)}: {USER_ERRORS[error.errno]}") from None
    except InputError:
        raise
    except ValueError:  # a NUL or a lone surrogate in the name
        raise InputError(f"{_one_line(path)}: no such file") from None


def regular(path: str | Path) -> Path:
    """Check a file that a library will open, and return its path. Raises InputError as open_input does."""
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
    """Read a UTF-8 file of at most `largest` bytes. Raises InputError if it is longer or not UTF-8."""
    with open_input(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise InputError(f"{path}: more than {largest:,} bytes, too large for a file of this kind: give another file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#04x}): save it as UTF-8") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError, naming the file, if it is missing, malformed, no object, or has a key twice."""

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
def as_input_error(path: str | Path, remedy: str) -> Iterator[None]:
    """Convert exceptions about the content of `path` to an InputError that names it and the remedy.

    Only for code that reads and plots. Training and writing must be outside, so that their errors are not blamed on the file.
    """
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}: {remedy}") from error
    except _content_errors() as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: not as it was written ({reason[:200]}): {remedy}") from error


def _content_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that malformed content raises: Python's, and those of safetensors, jinja2 and huggingface_hub if imported."""
    loaded = (
        (sys.modules.get("safetensors"), "SafetensorError"),
        (sys.modules.get("jinja2"), "TemplateError"),
        (sys.modules.get("huggingface_hub.errors"), "StrictDataclassError"),
    )
    plain = LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
    return (*plain, *(getattr(module, name) for module, name in loaded if module is not None))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, as read_json does."""
    content = parse_yaml(read_text(path, LARGEST_RECIPE), f"{path}:")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}: restore it")
    return content
