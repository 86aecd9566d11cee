"""The pages of --help: an overview of the subcommands, and for each its examples and the keys that it reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING

from adept_fast.cli.commands import COMMANDS, DATA, RECIPE, Command
from adept_fast.settings.declared_keys import Key, declared_keys, written

WIDTH, COLUMN = 100, 38
FIRST = (*DATA, "probe", "output_dir")  # keys of the recipe without a table: these stand before the tables, the others after them
OTHERS = "Any other name of transformers' TrainingArguments works too, as tune.NAME."


def overview() -> str:
    """Return what adept-fast does, the three usual commands, and all subcommands."""
    grouped: dict[str, str] = {}
    for name, command in COMMANDS.items():
        word, _, action = name.partition(" ")
        grouped[word] = f"{grouped[word]}, {action}" if word in grouped else f"edit copies on disk: {action}" if action else command.what
    rows = [f"  {word:<10} {what}" for word, what in grouped.items()]
    return "\n".join(
        (
            "Adapt a causal language model to a domain without losing what it knows:",
            "score its layers, copy the least critical ones, tune only the copies, report gains and losses.",
            "",
            "  adept-fast demo                                           try it on a small model, in minutes",
            "  adept-fast run model_name_or_path=MODEL domain=my.txt     adapt MODEL to a text",
            "  adept-fast recipe > my.yaml                               the usual settings as a file to edit",
            "",
            *rows,
            "",
            "adept-fast SUBCOMMAND --help lists the keys of a subcommand with defaults and meaning.",
            "--debug shows the traceback of an error, --version the version.",
        )
    )


def page(name: str) -> str:
    """Return the help of a subcommand, or of all actions of one that has them."""
    if name in COMMANDS:
        return "\n".join(_page(name, COMMANDS[name]))
    actions = {full: command for full, command in COMMANDS.items() if full.startswith(f"{name} ")}
    rows = [f"  adept-fast {full:<16} {command.what}" for full, command in actions.items()]
    return "\n".join((f"usage: adept-fast {name} ACTION key=value ...", "", *rows, "", f"adept-fast {name} ACTION --help lists its keys."))


def _page(name: str, command: Command) -> Iterator[str]:
    takes = ["[recipe.yaml]" if command.words == RECIPE else command.words, "key=value ..." if command.declarations else ""]
    yield " ".join(filter(None, (f"usage: adept-fast {name}", *takes)))
    yield ""
    yield f"{command.what[0].upper()}{command.what[1:]}."
    yield ""
    yield "examples:"
    yield from (f"  adept-fast {name} {example}".rstrip() for example in command.examples)
    defaults = dict(setting.split("=", 1) for setting in command.defaults)
    for title, keys in groups(command):
        yield ""
        yield f"{title}:"
        for key in keys:
            needed = key.name in command.needs or key.default is MISSING
            default = defaults.get(key.name, "..." if needed or key.default in ("", ()) else written(key.default))
            yield from entry(f"  {key.name}={default}", f"(must be given) {key.told}" if needed else key.told)
        if title == "tune":
            yield from textwrap.wrap(OTHERS, WIDTH, initial_indent="  ", subsequent_indent="  ")


def groups(command: Command) -> Iterator[tuple[str, list[Key]]]:
    """Yield the keys that a command reads under their titles: its own; model and data, its tables, then the rest of the recipe."""
    for kind in command.declarations:
        keys = [*declared_keys(kind)]
        if command.tables is None or kind is not command.declarations[-1]:
            yield "keys", keys
            continue
        yield "model and data", [key for key in keys if key.name in FIRST]
        for table in command.tables:
            yield table, [key for key in keys if key.table == table]
        if command.also:
            yield "of other tables", [key for key in keys if key.name in command.also]
        yield "shared by all subcommands", [key for key in keys if not key.table and key.name not in FIRST]


def entry(left: str, told: str, mark: str = "") -> list[str]:
    """Return the lines of a key: what is written, and what is told of it, wrapped after `mark`."""
    lines = textwrap.wrap(told, WIDTH - COLUMN - len(mark), break_long_words=False, break_on_hyphens=False)
    first = [f"{left:<{COLUMN}}{mark}{lines[0]}"] if lines and len(left) < COLUMN else [left]
    return [*first, *(f"{' ' * COLUMN}{mark}{line}" for line in lines[len(left) < COLUMN :])]
