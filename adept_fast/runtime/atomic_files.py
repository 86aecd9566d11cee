"""Artefacts on disk: written under a temporary name beside the final one, fsynced, renamed. A half-written one is never found by name."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError

STAGING = ".partial-"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failures_naming(path: Path) -> Iterator[None]:
    """What the machine refuses while `path` is written is an OSError that names it: the system's name no file, a library's no cause."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except _of_libraries() as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _of_libraries() -> tuple[type[Exception], ...]:
    """What torch.save and safetensors raise when a write fails."""
    from safetensors import SafetensorError

    return RuntimeError, SafetensorError


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path` atomically, on an error it is removed and `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{STAGING}{secrets.token_hex(8)}-{path.name}")
    try:
        with failures_naming(path):
            yield staging
            _sync(staging)
            os.replace(staging, path)
            _sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """The same for a folder. An existing `path` is an error: nothing is overwritten."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists already: remove it or choose another output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{path.name}-", dir=path.parent))
    try:
        staging.chmod(0o755)
        with failures_naming(path):
            yield staging
            for file in staging.rglob("*"):
                _sync(file)
            _sync(staging)
            os.rename(staging, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a folder, under a temporary name: by its own it is whole or gone."""
    leaving = path.with_name(f"{STAGING}{path.name}")
    if leaving.exists():
        shutil.rmtree(leaving)
    os.rename(path, leaving)
    shutil.rmtree(leaving)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left under temporary names in `folder`."""
    for leftover in folder.glob(f"{STAGING}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def write_text(path: Path, text: str) -> None:
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
