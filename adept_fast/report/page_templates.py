"""Fill in the pages of this folder: one look, one file that refers to nothing outside itself, all text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill in a template of this folder."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    return environment.get_template(template).render(context)


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """List settings as (dotted key, value), without those that are null."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, (list, tuple)) and any(isinstance(entry, Mapping) for entry in content):
        for index, entry in enumerate(content):
            yield from flatten(entry, f"{prefix}[{index}]")
    elif content is not None:
        yield prefix, ", ".join(map(str, content)) if isinstance(content, (list, tuple)) else str(content)
