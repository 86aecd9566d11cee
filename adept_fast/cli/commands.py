"""The subcommands of adept-fast, in the order of the overview. --help, the reference page, completion and the checks of what is typed come
from this table and from the declarations of the keys.

To add one, say `adept-fast audit`: write adept_fast/cli/audit.py with

    def run(name: str, words: Sequence[str]) -> str | None: ...

which takes what stands after the subcommand and returns the line to print, and a line in COMMANDS. A command that takes a recipe names the
`tables` that it reads and builds the recipe by `stages.recipe_of(name, words)`. A command with keys of its own declares them as a frozen
dataclass of `declare` fields in its module, names the class as `keys`, and builds it by `key_value.settings(Class, words)`.
Such a module is imported for --help, so it imports torch, transformers and the rooms that need them inside `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

MODEL = ("model_name_or_path",)
DATA = (*MODEL, "domain")
RECIPE = "recipe.yaml"
ALL = ("score", "expand", "tune", "eval")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand.

    what: it does, for the overview
    examples: what is typed after its name
    module: file under adept_fast/cli whose `run` runs it
    keys: name of the dataclass in that module that declares keys of its own, or ""
    tables: of the recipe that it reads, beside the keys without a table; None if it takes no recipe
    also: keys that it reads from other tables
    needs: keys of the recipe that must be given
    defaults: settings in place of the recipe's defaults
    words: what else it takes beside key=value, such as "recipe.yaml"
    processes: whether several processes, started by torchrun or accelerate, run it together
    light: whether it works without the packages of the extra [hf]
    """

    what: str
    examples: tuple[str, ...]
    module: str = "stages"
    keys: str = ""
    tables: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    words: str = ""
    processes: bool = False
    light: bool = False

    @property
    def declarations(self) -> list[type]:
        """Return the dataclasses that declare its keys."""
        found: list[type] = [getattr(import_module(f"adept_fast.cli.{self.module}"), self.keys)] if self.keys else []
        if self.tables is not None:
            from adept_fast.pipeline.recipe import Recipe

            found.append(Recipe)
        return found


COMMANDS = {
    "demo": Command(
        what="the whole method on a small real model, in minutes",
        examples=("", "output_dir=adept_demo tune.max_steps=20"),
        module="demo",
        tables=ALL,
        defaults=(
            "output_dir=adept_demo",
            "score.max_items=48",
            "score.loss=kl",
            "tune.block_size=512",
            "tune.per_device_train_batch_size=1",
            "tune.max_steps=60",
            "tune.learning_rate=1e-3",
            "tune.refresh_steps=20",
            "tune.max_items=8",
            "eval.max_items=16",
        ),
    ),
    "recipe": Command(
        what="print a commented recipe to start from",
        examples=("> my.yaml", "model_name_or_path=MODEL domain=my.txt all=true > my.yaml"),
        module="recipe",
        keys="Starter",
        tables=ALL,
        words=RECIPE,
        light=True,
    ),
    "run": Command(
        what="score, expand, verify, tune, evaluate, report",
        examples=("model_name_or_path=MODEL domain=my.txt output_dir=out", "my.yaml tune.learning_rate=1e-4"),
        tables=ALL,
        needs=DATA,
        words=RECIPE,
    ),
    "plan": Command(
        what="say what a run will read, take and write, before it runs",
        examples=("model_name_or_path=MODEL domain=my.txt", "my.yaml json=true", "demo=true"),
        module="plan",
        keys="Shown",
        tables=ALL,
        needs=MODEL,
        words=RECIPE,
    ),
    "score": Command(
        what="measure which layers general competence rests on",
        examples=("model_name_or_path=MODEL score.max_items=64", "my.yaml score.loss=kl"),
        tables=("score", "expand"),
        also=("tune.replay", "tune.streaming", "eval.general", "eval.domain", "eval.also"),
        needs=MODEL,
        words=RECIPE,
        processes=True,
    ),
    "expand": Command(
        what="copy the chosen layers, silent at first, and verify",
        examples=("model_name_or_path=MODEL expand.layers=[3,7]", "my.yaml expand.k=4"),
        tables=("expand",),
        also=("tune.max_items",),
        needs=MODEL,
        words=RECIPE,
    ),
    "verify": Command(
        what="check that base and expanded model agree bit for bit",
        examples=("model_name_or_path=MODEL dtype=bfloat16", "my.yaml"),
        tables=(),
        needs=MODEL,
        words=RECIPE,
    ),
    "tune": Command(
        what="train the copies on the domain, each unit at its own rate",
        examples=("model_name_or_path=MODEL domain=my.txt tune.learning_rate=1e-4", "my.yaml tune.max_steps=100"),
        tables=("tune",),
        also=("expand.initialisation", "eval.general", "eval.domain", "eval.also"),
        needs=DATA,
        words=RECIPE,
        processes=True,
    ),
    "eval": Command(
        what="loss, perplexity and accuracy of base and tuned model",
        examples=("model_name_or_path=MODEL domain=my.txt output_dir=out", "my.yaml eval.max_items=200"),
        tables=("eval",),
        also=("tune.replay", "tune.streaming"),
        needs=MODEL,
        words=RECIPE,
    ),
    "report": Command(
        what="write output_dir/report.html again",
        examples=("output_dir=out", "my.yaml"),
        tables=(),
        words=RECIPE,
    ),
    "compare": Command(
        what="several runs side by side, with the spread over seeds",
        examples=("out/a out/b output_dir=out/compare", "out/seed*"),
        module="compare",
        keys="Compare",
        words="FOLDER ...",
    ),
    "generate": Command(
        what="let a model answer prompts, and its base beside it",
        examples=('source=out/tuned prompt="What is a heron?"', 'source=out/tuned prompt="What is a heron?" base=true temperature=0.7'),
        module="generate",
        keys="Generate",
    ),
    "copies remove": Command(
        what="take copies out again; without any it is the original",
        examples=("source=out/tuned target=plain", "source=out/tuned target=fewer copies=[3,8]"),
        module="copies",
        keys="Remove",
    ),
    "copies extract": Command(
        what="write the copies alone, a small checkpoint",
        examples=("source=out/tuned target=delta",),
        module="copies",
        keys="Extract",
    ),
    "copies apply": Command(
        what="put extracted copies into the base they belong to",
        examples=("base=MODEL delta=delta target=tuned",),
        module="copies",
        keys="Apply",
    ),
    "copies merge": Command(
        what="average or stack the copies of two models made on one base",
        examples=("a=law/tuned b=medicine/tuned target=both how=stack", "a=law/tuned b=medicine/tuned target=both weights=[0.3,0.7]"),
        module="copies",
        keys="Merge",
    ),
    "copies dial": Command(
        what="scale what training made of the copies by alpha",
        examples=("source=out/tuned target=half alpha=0.5",),
        module="copies",
        keys="Dial",
    ),
    "push": Command(
        what="upload a model with its card to the hub, or say what would be",
        examples=("source=out/tuned repo=USER/NAME private=true", "source=out/tuned repo=USER/NAME dry_run=true"),
        module="push",
        keys="Push",
    ),
    "info": Command(what="versions, and which backends were found", examples=("",), module="info", light=True),
}
