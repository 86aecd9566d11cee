"""What was typed: the subcommand, a question for help, and settings in a spelling of other tools, which are answered with the right one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from itertools import zip_longest

from adept_fast import __version__
from adept_fast.cli import help
from adept_fast.cli.commands import COMMANDS, RECIPE
from adept_fast.errors import InputError
from adept_fast.settings.aliases import suggestions
from adept_fast.settings.key_value import keys_of
from adept_fast.settings.validation import shown

SUBCOMMANDS = tuple(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))
OTHER_NAMES = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "sft", "pretrain", "cpt", "fit", "training"), "tune"),
    **dict.fromkeys(("evaluate", "test", "evaluation", "benchmark"), "eval"),
    **dict.fromkeys(("all", "start", "pipeline", "adapt"), "run"),
    **dict.fromkeys(("config", "init", "template", "settings", "keys"), "recipe"),
    **dict.fromkeys(("env", "doctor", "status"), "info"),
    **{name.removeprefix("copies "): name for name in COMMANDS if name.startswith("copies ")},
}
"""What others call a subcommand."""
OF_A_RECIPE = ("config", "config_file", "recipe", "c", "f", "file", "yaml")


def asked_for(words: Sequence[str]) -> str | None:
    """Return the page that was asked for by no words at all, help, --help, -h or --version; None if a subcommand is to run."""
    if not words:
        return help.overview()
    if words[0] in ("--version", "-V", "version"):
        return __version__
    if words[0] != "help" and not {"--help", "-h"} & {*words}:
        return None
    about = [word for word in words if word not in ("help", "--help", "-h")]
    if not about:
        return help.overview()
    if about[0] in SUBCOMMANDS and (about[0] in COMMANDS or len(about) == 1):
        return help.page(about[0])
    return help.page(command_of(about)[0])


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the subcommand and the words after it. Raises InputError for one that there is not."""
    first, *rest = words
    if first in COMMANDS:
        return first, rest
    if first in SUBCOMMANDS:
        actions = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
        if rest and rest[0] in actions:
            return f"{first} {rest[0]}", rest[1:]
        found = f"unknown action {shown(rest[0])}" if rest else "which action?"
        near = difflib.get_close_matches(rest[0], actions, n=1) if rest else []
        raise InputError(f"{first}: {found}{f': did you mean {near[0]}?' if near else ''} ({first} takes {', '.join(actions)})")
    if "=" in first or os.path.isfile(first):
        raise InputError(f"a subcommand comes first, such as adept-fast run {first} (adept-fast --help lists them)")
    near = [OTHER_NAMES[first.lower()]] if first.lower() in OTHER_NAMES else difflib.get_close_matches(first.lower(), SUBCOMMANDS, n=1)
    raise InputError(f"unknown subcommand {shown(first)}{f': did you mean {near[0]}?' if near else ''} (adept-fast --help lists them)")


def require_settings(name: str, words: Sequence[str]) -> None:
    """Raise InputError for settings that are not written key=value, with what to write."""
    command = COMMANDS[name]
    if words and not (command.declarations or command.words):
        raise InputError(f"{name} takes no settings, found {shown(words[0])}")
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        free = bool(after) and "=" not in after and not after.startswith("-") and not os.path.exists(after)
        if word.startswith("-"):
            raise _option(name, word, after if free else "")
        if os.path.exists(word):
            continue
        key, _, value = (part.strip() for part in word.partition(":"))
        if after.startswith("="):
            value = after[1:] or "VALUE"
        elif free:
            value = value or after
        spaced = word.endswith("=") and free and command.words != RECIPE
        right = word[:-1] if spaced else _keys(name, key) if "=" not in word and value else ""
        if right:
            raise InputError(f"{shown(f'{word} {after}'.strip())}: settings are written key=value, without spaces: {right}={value}")
        if "=" not in word and not command.words:
            raise InputError(f"{shown(word)}: expected key=value; {name} takes settings only (a value with spaces goes in quotes)")


def _option(name: str, word: str, after: str) -> InputError:
    command = COMMANDS[name]
    key, equals, value = word.lstrip("-").partition("=")
    value = value if equals else after
    if command.words == RECIPE and key in OF_A_RECIPE:
        return InputError(f"{word}: a recipe is given by its name alone: adept-fast {name} {value or RECIPE}")
    right = _keys(name, key.replace("-", "_"))
    if right:
        return InputError(f"{word}: settings are written key=value, without dashes: {right}={value or '...'}")
    return InputError(f"unknown option {word}: settings are written key=value (adept-fast {name} --help lists them)")


def _keys(name: str, key: str) -> str:
    """Return the key that is meant, or "" if none is near."""
    if not key:
        return ""
    known = tuple(known for kind in COMMANDS[name].declarations for known in keys_of(kind))
    return key if key in known else next(iter(suggestions(key, known)), "")
