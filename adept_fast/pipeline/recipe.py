"""Declare the recipe: its keys, their defaults, and which of them exclude each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from adept_fast.checkpoints.settings import DTYPES
from adept_fast.data.encoding import SPECIAL_TOKENS
from adept_fast.data.sources import GENERAL, Source
from adept_fast.errors import InputError
from adept_fast.evaluation.settings import Eval
from adept_fast.expansion.settings import Expand
from adept_fast.runtime.input_files import LARGEST_RECIPE, read_text
from adept_fast.runtime.yaml_text import parse_yaml
from adept_fast.scoring.settings import Score
from adept_fast.settings.key_value import keys_of, settings
from adept_fast.settings.validation import COUNT, SEEDS, Range, declare, require_path, shown
from adept_fast.tuning.methods import METHODS
from adept_fast.tuning.settings import Tuning

PLACEHOLDERS = {"model_name_or_path": "<model folder or hub name>", "domain": "<text file or folder>"}
"""What stands in a starting recipe (`adept-fast recipe`) in the place of what must be given."""


@dataclass(frozen=True)
class Tune(Tuning):
    max_items: int = declare(64, COUNT, "probe items and held-out documents measured at each refresh")
    replay: Source | None = declare(
        None, meaning="a general corpus mixed into training: file, dataset name or {path, ..., weight or share}"
    )
    streaming: bool | None = declare(
        None, meaning="read documents while training; null: where they exceed 1 GiB on disk, or a source has a share"
    )
    shuffle_window: int = declare(10_000, COUNT, "documents of a source that a stream shuffles at a time")
    lora_rank: int = declare(16, COUNT, "rank of method=lora")


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Only model_name_or_path and domain must be given."""

    model_name_or_path: str = declare("", meaning="folder or hub name of the model to adapt")
    domain: tuple[Source, ...] = declare(
        (), meaning="file, folder, glob, dataset name, {path, split, column, template, weight}, or a list of them"
    )
    output_dir: str = declare("adept_out", meaning="folder of all that a run writes; the same command goes on from what is there")
    method: str = declare("adept", METHODS, "what is trained: adept copies layers by their scores; the others are ablations and baselines")
    probe: Source = declare(
        Source(GENERAL), meaning="the bundled probe; or a file, folder, glob, dataset name, {path, split, column, template}"
    )
    revision: str | None = declare(None, meaning="branch, tag or commit of a hub model")
    dtype: str | None = declare(None, DTYPES, "of the weights; null: the checkpoint's")
    attn_implementation: str | None = declare(
        None, meaning="sdpa, flash_attention_2 and so on; null: transformers' choice; with flash attention documents are packed in one row"
    )
    trust_remote_code: bool = declare(False, meaning="run the Python code that comes with a model")
    special_tokens: str = declare(
        "text", SPECIAL_TOKENS, 'read "</s>" and other control tokens in the data as plain text, or as the tokens'
    )
    seed: int = declare(0, SEEDS, "of the order of the data and all else that is drawn in training")
    malformed_rows: int = declare(0, Range(0), "rows of a source that may be left out because they cannot be read; 0 stops at the first")
    score: Score = Score()
    expand: Expand = Expand()
    tune: Tune = field(default_factory=Tune)
    eval: Eval = Eval()

    @property
    def folder(self) -> Path:
        return require_path("output_dir", self.output_dir)

    @property
    def unused(self) -> str | None:
        """Return the warning for a method that copies nothing and an `expand` table, or None."""
        given = [f"expand.{key}" for key, value in vars(self.expand).items() if value != getattr(Expand, key)]
        if not given or METHODS[self.method].copies:
            return None
        return f"warning: method={self.method} copies no layers: {', '.join(given)} has no effect"

    def copied(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return the inputs of the copies: the layers, and the initialisation unless it is the default."""
        how = self.expand.initialisation
        return {"expand.layers": list(layers), **({} if how == Expand.initialisation else {"expand.initialisation": how})}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def section(table: str, **others: str) -> Iterator[None]:
    """Name settings at fault by their keys: "refresh_steps must be ..." becomes "tune.refresh_steps must be ...". table: of the recipe;
    others: arguments that are keys by another name."""
    try:
        yield
    except InputError as error:
        own = set(keys_of(get_type_hints(Recipe)[table]))
        keys = {name: f"{table}.{name}" for name in error.arguments if re.split(r"[.\[]", name)[0] in own}
        error.rename({**keys, **others})
        raise


def load(path: str | None, overrides: Sequence[str] = (), required: Iterable[str] = ("model_name_or_path", "domain")) -> Recipe:
    """Read a YAML recipe (or none), apply "key.sub=value" overrides, check every key and value. Raises InputError."""
    content: dict[str, Any] = {}
    if path is not None:
        if not os.path.exists(path):
            raise InputError(f"{shown(path)}: no such recipe (a setting is written key=value)")
        content = parse_yaml(read_text(path, LARGEST_RECIPE), f"{path}:", plain_scalars=True) or {}
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected keys and values, found {shown(content)} (a text to train on is given as domain={path})")
    recipe = settings(Recipe, overrides, content)
    check_together(recipe)
    for key, values in {"model_name_or_path": [recipe.model_name_or_path], "domain": [source.path for source in recipe.domain]}.items():
        if PLACEHOLDERS[key] in values:
            raise InputError(f"{key}: {PLACEHOLDERS[key]} still stands in the recipe: put what it says in its place, or give {key}=...")
    for key in required:
        if not getattr(recipe, key):
            raise InputError(f"{key} is missing: give it as {key}=... or in the recipe")
    return recipe


def check_together(recipe: Recipe) -> None:
    """Raise InputError for settings that exclude each other or would have no effect."""
    method, score, expand, tune = METHODS[recipe.method], recipe.score, recipe.expand, recipe.tune
    measured_on = {"probe": recipe.probe, "eval.general": recipe.eval.general, "eval.domain": recipe.eval.domain}
    measured_on |= {f"eval.also.{name}": source for name, source in (recipe.eval.also or {}).items()}
    for key, source in measured_on.items():
        if source is not None and (source.weight != 1 or source.share is not None):
            raise InputError(f"{key}: weight and share say how much of a source is trained on, and {key} is not: leave them out")
    if method.uniform and expand.layers is not None:
        raise InputError(f"method={recipe.method} spaces the copies evenly: leave expand.layers out")
    if recipe.method == "replay" and tune.replay is None:
        raise InputError("method=replay needs a corpus to replay: set tune.replay, with a share or weight")
    if expand.budget is not None and (method.uniform or expand.layers is not None):
        given = f"method={recipe.method} takes expand.k" if method.uniform else "expand.layers says which"
        raise InputError(f"expand.budget chooses how many layers to copy, but {given}: leave one out")
    if expand.budget is not None and not expand.budget.shares:
        raise InputError("expand.budget: no share of full training is given: set parameters or time in it, or leave it out")
    measured = {
        "tune.anchor_weight": tune.anchor_weight,
        "tune.general_limit": tune.general_limit,
        "eval.general_limit": recipe.eval.general_limit,
    }
    for key, limit in measured.items():
        if not method.copies and limit is not None:
            raise InputError(f"method={recipe.method} keeps no base inside the model to measure against: leave {key} out")
    if score.unit_layers is not None and score.units is None:
        raise InputError("score.unit_layers: no units are masked: set score.units too, or leave it out")
    if score.loss == "kl" and score.method != "masking":
        raise InputError(f"score.loss=kl: only method=masking has a profile by it, not {score.method}: take answer or all")
    if score.regret is not None:
        if score.method != "masking":
            raise InputError(f"score.regret: a race measures masking, not {score.method}: leave one out")
        if expand.budget is not None:
            raise InputError("score.regret: a race is for a given number of layers: give expand.k and no expand.budget")
        if expand.placement == "lowest_per_band":
            raise InputError("score.regret: a race finds the lowest layers: leave expand.placement at lowest")
