"""`adept-fast plan`: say what a run would read, reuse, take and write, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass

from adept_fast.cli.stages import recipe_of
from adept_fast.settings import key_value
from adept_fast.settings.validation import declare


@dataclass(frozen=True)
class Shown:
    json: bool = declare(False, meaning="print the plan as JSON, and all messages on stderr")
    demo: bool = declare(False, meaning="plan the demo: with its model, its text and its settings")


def run(name: str, words: Sequence[str]) -> str:
    from adept_fast.cli import demo
    from adept_fast.pipeline.plan import plan
    from adept_fast.pipeline.planning.text import lines
    from adept_fast.pipeline.run_directory import RunDirectory
    from adept_fast.runtime.strict_json import dumps

    own = [word for word in words if word.startswith(("json=", "demo="))]
    shown, given = key_value.settings(Shown, own), [word for word in words if word not in own]
    with redirect_stdout(sys.stderr) if shown.json else nullcontext():
        recipe = demo.recipe_of(given) if shown.demo else recipe_of(name, given)
        found = plan(recipe, RunDirectory(recipe.folder))
    return dumps(found.as_dict(), indent=1) if shown.json else "\n".join(lines(found))
