"""`adept-fast score`, `expand`, `verify`, `tune`, `eval`, `report` and `run`: the stages of a recipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adept_fast.cli.commands import COMMANDS
from adept_fast.errors import InputError

if TYPE_CHECKING:
    from adept_fast.pipeline.recipe import Recipe

logger = logging.getLogger(__name__)


def run(name: str, words: Sequence[str]) -> None:
    from adept_fast.pipeline.run import STAGES
    from adept_fast.pipeline.run_directory import RunDirectory

    recipe = recipe_of(name, words)
    directory = RunDirectory(recipe.folder)
    with directory.held():
        STAGES[name](recipe, directory)


def recipe_of(name: str, words: Sequence[str]) -> Recipe:
    """Build the recipe of a command from a file, if one is given, and settings that override it. Raises InputError."""
    from adept_fast.pipeline.recipe import load
    from adept_fast.settings.key_value import overridden

    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    if len(files) > 1:
        raise InputError(f"one recipe at most, found {', '.join(files)} (a setting is written key=value)")
    for file in files:
        if os.path.isdir(file):
            keys = f"output_dir={file}, domain={file} or model_name_or_path={file}"
            raise InputError(f"{file}: a folder, and no recipe: write {keys}, whichever it is")
        if not os.path.exists(file) and not file.endswith((".yaml", ".yml")):
            written = f"a setting is written key=value (in quotes if it has spaces), such as model_name_or_path={file}"
            raise InputError(f"{file}: no such recipe; {written}")
    overrides = [word for word in words if word not in files]
    for override in overridden(overrides):
        logger.warning(f"{override}: given again later, where it counts")
    return load(files[0] if files else None, overrides, COMMANDS[name].needs)
