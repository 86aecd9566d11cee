"""Strict YAML: no duplicate keys, a bounded size after aliases are expanded, and on request plain scalars as written."""

from __future__ import annotations

from typing import Any

from adept_fast.errors import InputError

LARGEST = 100_000  # nodes of a document with aliases expanded
DEEPEST = 50  # levels


class PlainScalar(str):
    """The text of a scalar without quotes, not converted: YAML 1.1 reads 010 as 8, 1e-4 as text, no as false and 1:30 as 90."""


def parse_yaml(text: str, what: str, plain_scalars: bool = False) -> Any:
    """Parse one YAML document.

    what: beginning of error messages.
    plain_scalars: return scalars without quotes as PlainScalar.

    Raises InputError if it is malformed, too large or too deep, or has a key twice, of which YAML would silently take the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        if plain_scalars:
            yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # merge keys

            def construct_scalar(self, node: Any) -> Any:
                value = super().construct_scalar(node)
                return PlainScalar(value) if node.style is None and isinstance(value, str) else value

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"key {key.value} twice, first in line {key.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:  # invalid numbers and dates raise other errors than YAML's
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST} entries with its aliases expanded")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{what} not valid YAML ({' '.join(str(error).split())})") from None


def _size(node: Any, known: dict[int, int | None], depth: int = 0) -> int:
    """Count the nodes of a document with aliases expanded. Raises ValueError if it contains itself or is nested too deeply."""
    if isinstance(node.value, str):
        node.value.encode()  # raises for a lone surrogate, which an escape can give
        return 1
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError(f"the entry in line {node.start_mark.line + 1} contains itself")
        return size
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1} is nested more than {DEEPEST} deep")
    known[id(node)] = None
    inner = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = size = 1 + sum(_size(part, known, depth + 1) for part in inner)
    return size
