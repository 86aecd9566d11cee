"""Builds frozen dataclasses from nested mappings and "key.sub=value" overrides. The error for unknown keys suggests known ones.

The type of a field may be another such dataclass, a class with a constructor `of(value)`, or a tuple. A field whose metadata has "known",
"checked" and "elsewhere" takes the keys that are no field: known() returns their names, checked(key, value) the value, and raises for those
in `elsewhere`. values.py defines how values are written, aliases.py what other tools call a key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from adept_fast.errors import InputError
from adept_fast.settings.aliases import hint
from adept_fast.settings.validation import check, cut, options, prefixed, shown
from adept_fast.settings.values import parse_value, read

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
LISTED = 20  # known keys that a message lists at most
TOLD = 5  # unknown keys that it answers


def settings(kind: type[T], overrides: Sequence[str], content: Mapping[str, Any] | None = None) -> T:
    """Build the dataclass `kind` from `content` and "key.sub=value" overrides. Raises InputError for an unknown, wrong or missing key."""
    content = dict(content or {})
    for override in overrides:
        _override(content, override)
    if faults := [*_unknown_keys(kind, content, "", kind)]:
        more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        raise InputError("; ".join(map(str, faults[:TOLD])) + more)
    return _build(kind, content, "", kind)


def overridden(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that have no effect because a later one sets the same key."""
    last = {override.partition("=")[0]: override for override in overrides}
    return [override for override in overrides if last[override.partition("=")[0]] != override]


def unknown(key: str, known: Iterable[str], prefix: str, everywhere: Collection[str] = ()) -> InputError:
    """Make the error for an unknown key.

    known: keys of its table.
    prefix: of that table, such as "tune.".
    everywhere: all keys, by their full names.
    """
    known = sorted(known)
    everywhere = everywhere or [prefix + name for name in known]
    listed = "known keys: " + ", ".join(prefix + name for name in known) if len(known) <= LISTED else "adept-fast recipe all=true lists all"
    answer = hint(prefix + key, everywhere) or listed
    if prefix + key in everywhere:  # a dotted name as on the command line
        parents, _, last = key.rpartition(".")
        answer = f"in a recipe write it as a table: {': {'.join([*parents.split('.'), last])}: ...{'}' * (parents.count('.') + 1)}"
    return InputError(f"unknown key {prefix}{cut(key)}: {answer}")


def keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for entry in fields(kind):
        inner, _ = options(hints[entry.name])
        if "known" in entry.metadata:
            yield from (prefix + name for name in entry.metadata["known"]() if name not in entry.metadata["elsewhere"])
        elif _is_table(inner):
            yield prefix + entry.name
            yield from keys_of(inner, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{shown(override)}: expected key=value or key.sub=value")
    *parents, last = key.split(".")
    table = content
    for parent in parents:
        inner = table.get(parent) or {}
        if not isinstance(inner, Mapping):
            raise InputError(f"{key}: {parent} is not a table of settings but {shown(inner)}")
        table[parent] = inner = dict(inner)
        table = inner
    table[last] = parse_value(text, key)


def _unknown_keys(cls: type, content: Mapping[str, Any], prefix: str, root: type) -> Iterator[InputError]:
    """Yield the error for each unknown key of a table and of the tables in it."""
    hints, (declared, others) = get_type_hints(cls), _declared(cls)
    known = [*declared, *(others.metadata["known"]() if others else ())]
    for key, value in _beside(content, others).items():
        if key not in known:
            yield unknown(str(key), known, prefix, tuple(keys_of(root)))
        elif isinstance(value, Mapping) and key in declared and _is_table(options(hints[key])[0]):
            yield from _unknown_keys(options(hints[key])[0], value, f"{prefix}{key}.", root)


def _declared(cls: type) -> tuple[dict[str, Field[Any]], Field[Any] | None]:
    """Return the fields that are keys, and the one that takes the keys that are no field."""
    declared = {entry.name: entry for entry in fields(cls)}
    others = next((entry for entry in declared.values() if "known" in entry.metadata), None)
    return {name: entry for name, entry in declared.items() if entry is not others}, others


def _beside(content: Mapping[str, Any], others: Field[Any] | None) -> dict[str, Any]:
    """Return a table with its other keys, which a resolved recipe has in their own table, beside the fields. An override wins."""
    content = dict(content)
    inner = content.pop(others.name) if others and isinstance(content.get(others.name), Mapping) else {}
    return {**inner, **content}


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind) and not hasattr(kind, "of")


def _build(cls: type[T], content: Mapping[str, Any], prefix: str, root: type) -> T:
    """Build a table, whose keys are known."""
    hints, (declared, others) = get_type_hints(cls), _declared(cls)
    values: dict[str, Any] = {}
    if others:
        assert callable(others.default_factory)
        values[others.name] = others.default_factory()
    for key, value in _beside(content, others).items():
        if key in declared:
            values[key] = _read(value, hints[key], prefix + key, root)
            if values[key] is None and not options(hints[key])[1]:
                raise InputError(f"{prefix}{key} is empty: give it as {prefix}{key}=...")
            with prefixed(prefix):
                check(cls, **{key: values[key]})
        elif others:
            with prefixed(prefix):
                values[others.name][key] = others.metadata["checked"](key, value)
    missing = [name for name, entry in declared.items() if name not in values and entry.default is entry.default_factory is MISSING]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: give it as {prefix}{missing[0]}=...")
    return cls(**values)


def _read(value: Any, hint: Any, key: str, root: type) -> Any:
    """Convert a value to the type of its field. What cannot be converted stays, and fails the check of the field."""
    kind, _ = options(hint)
    nested = is_dataclass(kind)
    if hasattr(kind, "of"):
        value = _of_fields(value, kind) if isinstance(value, Mapping) and nested else read(value, str | None)
        if value is None:
            return None
        try:
            return kind.of(value)
        except InputError as error:
            if not error.arguments:
                raise InputError(f"{key}: {error}") from None
            error.rename({name: f"{key}.{name}" for name in error.arguments})
            raise
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if read(value, inner if inner is int else str) is None:
            return None
        if inner in (int, float) and isinstance(value, str) and "," in value and "[" not in value:
            raise InputError(f"{key}={value}: a list is written in brackets: {key}=[{value}]", key)
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_read(entry, inner, f"{key}[{index}]", root) for index, entry in enumerate(entries))
    if nested:
        if isinstance(value, Mapping):
            return _build(kind, value, f"{key}.", root)
        if (value := read(value)) is None:
            return None
        raise InputError(f"{key} must be a table of settings, found {shown(value)}: write {key}.name=value")
    return read(value, hint)


def _of_fields(table: Mapping[str, Any], kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {str(key): read(value, hints.get(key, Any)) for key, value in table.items()}
