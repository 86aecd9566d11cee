"""YAML without its surprises: no key twice, no document that grows without bound when its aliases are followed, and, where a reader knows
what its values are, plain scalars as they are written."""

from __future__ import annotations

from typing import Any

from adept_fast.errors import InputError

LARGEST = 100_000  # scalars, lists and tables of a document, those that aliases repeat counted again
DEEPEST = 50


class Written(str):
    """A scalar without quotes, as it stands there: whoever knows what it is to be reads it. YAML 1.1 reads 010 as 8, 1e-4 as text, no as
    false and 1:30 as 90."""


def parsed(text: str, what: str, as_written: bool = False) -> Any:
    """What a YAML text says; as_written: scalars without quotes as Written. what: begins the message.

    Raises InputError for one that says nothing, has a key twice (of which YAML would take the last in silence), or is too large or deep.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        if as_written:
            yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merging tables

            def construct_scalar(self, node: Any) -> Any:
                value = super().construct_scalar(node)
                return Written(value) if node.style is None and isinstance(value, str) else value

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"{key.value} stands there twice, first in line {key.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:  # beside YAML's own errors: numbers and dates that are none
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST} entries, once its aliases are followed")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{what} not valid YAML ({' '.join(str(error).split())})") from None


def _size(node: Any, known: dict[int, int | None], depth: int = 0) -> int:
    """Nodes of a document with aliases followed. Raises ValueError for one that holds itself, or is nested too deeply."""
    if isinstance(node.value, str):
        node.value.encode()  # half a character, as an escape can have it, is no text
        return 1
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError(f"what begins in line {node.start_mark.line + 1} holds itself")
        return size
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1} is nested more than {DEEPEST} deep")
    known[id(node)] = None
    inner = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = size = 1 + sum(_size(part, known, depth + 1) for part in inner)
    return size
