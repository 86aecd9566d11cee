"""`adept-fast recipe`: print a commented recipe, with the settings that are given filled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from adept_fast.cli.help import OTHERS, entry
from adept_fast.cli.stages import recipe_of
from adept_fast.settings import key_value
from adept_fast.settings.declared_keys import Key, declared_keys, written
from adept_fast.settings.validation import declare

if TYPE_CHECKING:
    from adept_fast.pipeline.recipe import Recipe

USUAL = (
    *("model_name_or_path", "domain", "output_dir", "seed", "score.max_items", "expand.k", "tune.block_size", "tune.refresh_steps"),
    *("tune.learning_rate", "tune.num_train_epochs", "tune.per_device_train_batch_size", "tune.gradient_accumulation_steps"),
    *("tune.bf16", "eval.max_items"),
)
HEAD = (
    "# A recipe of adept-fast. Put what is yours in the place of < >, then: adept-fast run my.yaml",
    "# A setting on the command line counts before the one here: adept-fast run my.yaml tune.learning_rate=1e-4",
)
MORE = "# These are the usual keys. adept-fast recipe all=true prints every one of them."


@dataclass(frozen=True)
class Starter:
    all: bool = declare(False, meaning="print every key, not the usual ones only")


def run(name: str, words: Sequence[str]) -> str:
    own = [word for word in words if word.startswith("all=")]
    everything = key_value.settings(Starter, own).all
    recipe = recipe_of(name, [word for word in words if word not in own])
    return "\n".join((*HEAD, *(() if everything else (MORE,)), "", *starter(recipe, everything)))


def starter(recipe: Recipe, everything: bool = False) -> Iterator[str]:
    """Yield the lines of a recipe: the usual keys and what is not at its default, or every key, each with its meaning as comment."""
    shown = [key for key in _keys_of(recipe) if everything or key.name in USUAL or _value(recipe, key) != key.default]
    for table, keys in groupby(shown, lambda key: key.table):
        if table:
            yield f"{table}:"
        for key in keys:
            value = _value(recipe, key)
            commented = key.passed_on and value == key.default
            left = f"{'  ' if table else ''}{'# ' if commented else ''}{key.name.rpartition('.')[2]}: {written(value)}"
            yield from entry(left, key.told, "# ")
        if table == "tune" and everything:
            yield f"  # {OTHERS.replace('tune.NAME', 'NAME')}"


def _keys_of(recipe: Recipe) -> Iterator[Key]:
    """Yield the declared keys, and after those of tune the TrainingArguments that are given and not listed."""
    keys = [*declared_keys(type(recipe))]
    names = {key.name for key in keys}
    others = [Key(f"tune.{name}", None, None, "", True) for name in recipe.tune.training if f"tune.{name}" not in names]
    last = max(index for index, key in enumerate(keys) if key.table == "tune") + 1
    yield from (*keys[:last], *others, *keys[last:])


def _value(recipe: Recipe, key: Key) -> Any:
    from adept_fast.pipeline.recipe import PLACEHOLDERS

    table, _, name = key.name.rpartition(".")
    place: Any = getattr(recipe, table) if table else recipe
    if table == "tune" and not hasattr(place, name):
        return place.training.get(name, key.default)
    value = getattr(place, name)
    return PLACEHOLDERS.get(key.name, value) if value in ("", ()) else value[0] if key.name == "domain" and len(value) == 1 else value
