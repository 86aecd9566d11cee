"""Frozen dataclasses from nested tables and "key.sub=value" overrides. An unknown key is an error that names the nearest one.

A field may be of another such dataclass, of a class that reads a value itself (`of`), or a tuple. One whose metadata has "known" and
"checked" takes the keys that are no field's: known() are their names, checked(key, value) the value to keep.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from adept_fast.errors import InputError
from adept_fast.settings.validation import check, cut, options, shown

T = TypeVar("T")
LISTED = 20  # known keys, in a message
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


def parsed(text: str, what: str) -> Any:
    """What a YAML text says. Raises InputError for one that says nothing, or a key twice, of which YAML would take the last in silence."""
    import yaml

    class EachKeyOnce(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"{key.value} stands there twice, first in line {key.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, EachKeyOnce)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # most of numbers and dates that are none
        raise InputError(f"{what} not valid YAML ({' '.join(str(error).split())})") from None


def settings(kind: type[T], overrides: Sequence[str], content: Mapping[str, Any] | None = None) -> T:
    """The dataclass `kind` from "key.sub=value" overrides of `content`. Raises InputError for an unknown, wrong or missing key."""
    content = dict(content or {})
    texts = [name for name, hint in get_type_hints(kind).items() if options(hint)[0] is str]
    for override in overrides:
        _override(content, override, texts)
    return _build(kind, content, "")


def unknown(key: str, known: Iterable[str], prefix: str) -> InputError:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    listed = "known keys: " + ", ".join(prefix + name for name in known) if len(known) <= LISTED else "docs/recipe.md says which there are"
    hint = f"did you mean {prefix}{near[0]}?" if near else listed
    return InputError(f"unknown key {prefix}{cut(key)}: {hint}")


def number(text: str) -> float | str:
    """The number that a text is, such as 2e-4, which YAML 1.1 reads as text; else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the values that are written 2e-4 as numbers."""
    return {key: float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value for key, value in table.items()}


def _override(content: dict[str, Any], override: str, texts: Sequence[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{shown(override)}: expected key=value or key.sub=value")
    value = parsed(text, f"{key}: the value is")
    if key in texts and text not in ("", "null"):
        value = text  # YAML would read 010, 1_0 or a date as something else
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        inner = table.get(parent) or {}
        if not isinstance(inner, Mapping):
            raise InputError(f"{key}: {parent} is no table of settings, but {shown(inner)}")
        table[parent] = inner = dict(inner)
        table = inner
    table[last] = value


def _build(cls: type, content: Mapping[str, Any], prefix: str) -> Any:
    hints, declared = get_type_hints(cls), {entry.name: entry for entry in fields(cls)}
    others = next((entry for entry in fields(cls) if "known" in entry.metadata), None)
    values: dict[str, Any] = {}
    if others is not None:
        del declared[others.name]
        values[others.name], content = others.default_factory(), dict(content)
        if isinstance(content.get(others.name), Mapping):  # as a resolved recipe has them
            content |= content.pop(others.name)
    for key, value in content.items():
        if key in declared:
            values[key] = _read(value, hints[key], prefix + key)
            check(cls, prefix, **{key: values[key]})
        elif others is not None and key in others.metadata["known"]():
            values[others.name][key] = others.metadata["checked"](key, value)
        else:
            raise unknown(str(key), [*declared, *(others.metadata["known"]() if others else ())], prefix)
    missing = [name for name, entry in declared.items() if name not in values and entry.default is entry.default_factory is MISSING]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: give it as {prefix}{missing[0]}=...")
    return cls(**values)


def _read(value: Any, hint: Any, key: str) -> Any:
    """A value as YAML has it in the form that the field has it in, where there is one."""
    kind, _ = options(hint)
    if value is None:
        return None
    if hasattr(kind, "of"):
        try:
            return kind.of(numbers(value) if isinstance(value, Mapping) else value)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
    if get_origin(kind) is tuple:
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_read(entry, get_args(kind)[0], f"{key}[{index}]") for index, entry in enumerate(entries))
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a table of settings, found {shown(value)}: write {key}.name=value")
        return _build(kind, value, f"{key}.")
    return number(value) if kind is float and isinstance(value, str) else value
