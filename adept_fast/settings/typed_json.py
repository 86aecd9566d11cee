"""Read JSON as frozen dataclasses, each entry checked by the type of its field, and write them.

A field's type is a number, text, a truth value, another such dataclass, or a list (tuple), a table (Mapping of str) or an optional
(| None) of these. A field whose name Python reserves ends in an underscore here, and not in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from adept_fast.errors import InputError
from adept_fast.settings.validation import alternatives, cut, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def from_json(kind: type[T], content: Any) -> T:
    """Build a dataclass from parsed JSON. Raises InputError that names the entry at fault, such as models.base.general.loss."""
    return cast(T, _read(kind, content, ""))


def as_json(value: Any) -> Any:
    """Convert dataclasses to JSON-like values. Fields at their default are left out."""
    if is_dataclass(value):
        given = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {name.rstrip("_"): as_json(given[name]) for name, default in _defaults(type(value)).items() if given[name] != default}
    if isinstance(value, Mapping):
        return {key: as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, tuple) else value


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the default of each field; MISSING where a value must be given."""

    def default(entry: Field[Any]) -> Any:
        return entry.default if entry.default_factory is MISSING else entry.default_factory()

    return {entry.name: default(entry) for entry in fields(kind)}


def _read(kind: Any, value: Any, where: str) -> Any:
    if NoneType in (kinds := alternatives(kind)):
        return None if value is None else _read(next(each for each in kinds if each is not NoneType), value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(where, value)
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if not isinstance(value, Mapping) or not (origin is Mapping or is_dataclass(kind)):
        raise _wrong(where, value)
    prefix = f"{where}." if where else ""
    if origin is Mapping:
        return {key: _read(inner[1], entry, f"{prefix}{cut(key)}") for key, entry in value.items()}
    hints, defaults = get_type_hints(kind), _defaults(kind)
    if unknown := sorted(value.keys() - {name.rstrip("_") for name in hints}):
        raise InputError(f"{prefix}{cut(unknown[0])} is no entry of it")
    if missing := [key for name, default in defaults.items() if default is MISSING and (key := name.rstrip("_")) not in value]:
        raise InputError(f"{prefix}{missing[0]} is missing")
    given = {name: key for name in hints if (key := name.rstrip("_")) in value}
    return kind(**{name: _read(hints[name], value[key], f"{prefix}{key}") for name, key in given.items()})


def _wrong(where: str, value: Any) -> InputError:
    return InputError(f"{where or 'it'} is {shown(value)}")
