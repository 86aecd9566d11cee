"""Packages that only an extra of this package installs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from adept_fast.errors import InputError


def optional(module: str, extra: str, purpose: str) -> Any:
    """Import and return `module`, which belongs to the extra [`extra`].

    Raises InputError, one line that says what for and how to install it, if its package is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise InputError(f"{purpose} needs {package}: pip install 'adept-fast[{extra}]'") from None
