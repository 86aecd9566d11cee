"""Frozen dataclasses from nested tables and "key.sub=value" overrides. An unknown key is an error that names the nearest one.

A field may be of another such dataclass, of a class that reads a value itself (`of`), a tuple, or a Count; one whose metadata has
"others", a function of key and value that gives a table, takes the keys that are no field's.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from adept_fast.errors import InputError

T = TypeVar("T")
Count = Annotated[int, "1 or more"]
KINDS = {int: "a whole number", str: "text", bool: "true or false", float: "a number"}
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def settings(kind: type[T], overrides: Sequence[str], content: Mapping[str, Any] | None = None) -> T:
    """The dataclass `kind` from "key.sub=value" overrides of `content`. Raises InputError for an unknown, wrong or missing key."""
    content = dict(content or {})
    texts = [name for name, hint in get_type_hints(kind).items() if hint in (str, str | None)]
    for override in overrides:
        _override(content, override, texts)
    return _build(kind, content, "")


def unknown(key: str, known: Iterable[str], prefix: str) -> InputError:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(prefix + name for name in known)}"
    return InputError(f"unknown key {prefix}{key}: {hint}")


def number(value: float | str, key: str) -> float:
    """A finite number, which YAML 1.1 reads as text where it is written 2e-4."""
    try:
        read = float(value)
    except ValueError:
        raise InputError(f"{key} must be a number, found {value!r}") from None
    if not math.isfinite(read):
        raise InputError(f"{key} must be a finite number, found {value!r}")
    return read


def numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the values that are written 2e-4 as numbers."""
    return {key: float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value for key, value in table.items()}


def _override(content: dict[str, Any], override: str, texts: Sequence[str]) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r}: expected key=value or key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{override}: the value is not valid YAML ({' '.join(str(error).split())})") from None
    if key in texts and text not in ("", "null"):
        value = text  # YAML would read 010, 1_0 or a date as something else
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        inner = table.get(parent)
        table[parent] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        table = inner
    table[last] = value


def _build(cls: type, content: Mapping[str, Any], prefix: str) -> Any:
    types = get_type_hints(cls, include_extras=True)
    others = next((entry for entry in fields(cls) if "others" in entry.metadata), None)
    values: dict[str, Any] = {} if others is None else {others.name: others.default_factory()}
    for key, value in content.items():
        if key in types and (others is None or key != others.name):
            values[key] = _coerce(value, types[key], prefix + key)
        elif others is not None:
            values[others.name] |= others.metadata["others"](str(key), value)
        else:
            raise unknown(str(key), types, prefix)
    missing = [entry.name for entry in fields(cls) if entry.name not in values and entry.default is entry.default_factory is MISSING]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: give it as {prefix}{missing[0]}=...")
    return cls(**values)


def _coerce(value: Any, kind: Any, key: str) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None:
        if NoneType in options:
            return None
        raise InputError(f"{key} must not be empty")
    kind = next(option for option in options if option is not NoneType)
    if hasattr(kind, "of"):
        try:
            return kind.of(numbers(value) if isinstance(value, Mapping) else value)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    if get_origin(kind) is tuple:
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(entry, get_args(kind)[0], f"{key}[{index}]") for index, entry in enumerate(entries))
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a table of settings, found {value!r}: write {key}.name=value")
        return _build(kind, value, f"{key}.")
    counts, kind = kind == Count, int if kind == Count else kind
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return number(value, key)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise InputError(f"{key} must be {KINDS[kind]}, found {value!r}")
    if counts and value < 1:
        raise InputError(f"{key} must be 1 or more, found {value}")
    return value
