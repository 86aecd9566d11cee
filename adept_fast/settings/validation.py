"""Declaration of a setting as a dataclass field (type, default, bounds, meaning), and checks of values against it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import reduce
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from adept_fast.errors import InputError

KINDS = {int: "a whole number", str: "text of one line", bool: "true or false", float: "a number"}
LONGEST = 1 << 63  # bound of whole numbers, which must fit int64
LONGEST_TEXT = 4096  # characters; the longest path of Linux
IN_NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and lone surrogates


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    above: `low` is excluded. below: `high` is excluded. why: meaning of `high`, for messages.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    why: str = ""

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.above else f"of {self.low} or more"
        if self.above:
            return f"above {self.low} and {'below' if self.below else 'at most'} {self.high}"
        return f"from {self.low} to {'below ' * self.below}{self.high}" + (f", {self.why}" if self.why else "")


COUNT = Range(1)
SEEDS = Range(0, 2**32 - 1)
Bounds = Range | Collection[str]
"""A range of numbers, or the allowed names."""


def declare(default: Any = MISSING, bounds: Bounds | None = None, meaning: str = "") -> Any:
    """Declare a dataclass field. bounds: of the value, or of each entry of a tuple, whose entries must then be distinct."""
    return field(default=default, metadata={"bounds": bounds, "meaning": meaning})


def options(hint: Any) -> tuple[Any, bool]:
    """Split a type hint into (its types other than None, whether None is allowed)."""
    kinds = alternatives(hint)
    return reduce(or_, (kind for kind in kinds if kind is not NoneType)), NoneType in kinds


def check(declared: type, group: str = "", /, needed: bool = False, **given: Any) -> None:
    """Raise InputError for an argument whose value the field of its name does not allow.

    declared: dataclass of the fields.
    group: prefix of the fields that the arguments lack, such as "rate_".
    needed: refuse None even if the field allows it.
    """
    hints = get_type_hints(declared)
    for entry in fields(declared):
        kind, optional = options(hints[entry.name])
        name = entry.name.removeprefix(group)
        if entry.name == group + name and name in given and (needed or not optional or given[name] is not None):
            require(name, given[name], kind, entry.metadata.get("bounds"))


@contextmanager
def prefixed(table: str) -> Iterator[None]:
    """Put a table's name before the arguments that an InputError names: with "expand.", "k must be ..." becomes "expand.k must be ..."."""
    try:
        yield
    except InputError as error:
        error.rename({name: table + name for name in error.arguments})
        raise


def require_made(name: str, value: object, kind: type, by: str) -> None:
    """Raise InputError for an argument `name` that is not of class `kind`. by: the call that makes one."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {kind.__name__}, found {type(value).__name__}: {by}")


def require_table(name: str, value: object) -> None:
    """Raise InputError under `name` for what is neither a mapping nor None."""
    if value is not None:
        require_made(name, value, Mapping, "give a dict, or leave it out")


def require_path(name: str, value: object) -> Path:
    """Return a path with ~ expanded. Raises InputError under `name` for what is no path, and for the home of a user that there is none."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise InputError(f"{name} must be a path, found {shown(value)}", name)
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: {value}: there is no such user: write the path out", name) from None


def require(name: str, value: Any, kind: Any, bounds: Bounds | None = None) -> None:
    """Raise InputError for a value of another type or out of bounds. A float must be finite; text must be one line and not empty."""
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)) and (bounds is None or _differ(value)):
        for index, entry in enumerate(value):
            require(f"{name}[{index}]", entry, get_args(kind)[0], bounds)
    elif not _is(value, kind) or (bounds is not None and value not in bounds):
        raise InputError(f"{name} must be {described(kind, bounds)}, found {shown(value)}", name)


def described(kind: Any, bounds: Bounds | None = None) -> str:
    """Describe a type and its bounds: "a whole number of 1 or more", "one of stop, cut"."""
    if get_origin(kind) is tuple:
        return "a list" if bounds is None else f"a list of {bounds if isinstance(bounds, Range) else ', '.join(bounds)}, each once"
    if isinstance(bounds, Range):
        return f"{KINDS[kind]} {bounds}"
    if bounds is not None:
        return f"one of {', '.join(bounds)}"
    return " or ".join("a list" if get_origin(each) is list else KINDS.get(each, "a table of settings") for each in alternatives(kind))


def shown(value: Any) -> str:
    """Return the repr of a value as one short line."""
    return cut(" ".join(repr(value).split()))


def cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _differ(entries: Sequence[Any]) -> bool:
    return not any(entry in entries[:index] for index, entry in enumerate(entries))


def _is(value: Any, kind: Any) -> bool:
    if len(kinds := alternatives(kind)) > 1:
        return any(_is(value, each) for each in kinds)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is tuple or (kind in (int, float) and isinstance(value, bool)):
        return False
    if kind is int:
        return isinstance(value, Integral) and abs(int(value)) < LONGEST
    if kind is float:
        return isinstance(value, Real) and value < math.inf and not value <= -math.inf
    if kind is str:
        return isinstance(value, str) and bool(value.strip()) and len(value) <= LONGEST_TEXT and not IN_NO_TEXT.search(value)
    return isinstance(value, get_origin(kind) or kind)
