"""The keys in docs/reference/recipe.md, from their declarations: `python tests/support/recipe_keys.py` writes them there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from adept_fast.data.sources import Source
from adept_fast.pipeline.recipe import Recipe
from adept_fast.settings.training_arguments import BOUNDS
from adept_fast.settings.validation import Bounds, Range

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"
BLOCK = re.compile(r"(?<=```yaml\n).+?(?=```)", re.DOTALL)
GIVEN = {"model_name_or_path": "MODEL", "domain": "my.txt"}  # what has no default


def keys(table: type = Recipe, prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for entry in sorted(fields(table), key=lambda entry: "known" in entry.metadata):
        default = entry.default_factory() if entry.default is MISSING else entry.default
        if "known" in entry.metadata:
            told = {next(iter(default)): entry.metadata["meaning"]}
            yield from (line(indent + name, value, BOUNDS.get(name), told.get(name)) for name, value in default.items())
        elif is_dataclass(default) and not isinstance(default, Source):
            yield f"{indent}{entry.name}:"
            yield from keys(type(default), f"{prefix}{entry.name}.")
        else:
            yield line(indent + entry.name, GIVEN.get(prefix + entry.name, default), entry.metadata["bounds"], entry.metadata["meaning"])


def line(name: str, value: Any, bounds: Bounds | None, meaning: str | None) -> str:
    """As YAML, with what it may be and what it means."""
    value = value.path if isinstance(value, Source) else value
    among = "" if bounds is None else f"({bounds})".replace("(of ", "(") if isinstance(bounds, Range) else " | ".join(bounds)
    said = [meaning, among] if isinstance(bounds, Range) else [f"{among}:" if among and meaning else among, meaning]
    entry = f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
    return f"{entry:<31} # {' '.join(filter(None, said))}" if any(said) else entry


def page(text: str) -> str:
    """The page with the keys as they are now."""
    block = "\n".join([*keys(), ""])
    return BLOCK.sub(lambda _: block, text, count=1)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
