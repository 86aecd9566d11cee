"""What was typed: the subcommand, a question for help, and settings in a spelling of other tools, which are answered with the right one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

from adept_fast import __version__
from adept_fast.cli import help
from adept_fast.cli.commands import COMMANDS, RECIPE
from adept_fast.errors import InputError
from adept_fast.settings.aliases import hint, suggestions
from adept_fast.settings.key_value import keys_of
from adept_fast.settings.validation import shown

SUBCOMMANDS = tuple(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))
OTHER_NAMES = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "sft", "pretrain", "cpt", "fit", "training"), "tune"),
    **dict.fromkeys(("evaluate", "test", "evaluation", "benchmark"), "eval"),
    **dict.fromkeys(("all", "start", "pipeline", "adapt"), "run"),
    **dict.fromkeys(("config", "init", "template", "settings", "keys"), "recipe"),
    **dict.fromkeys(("chat", "sample", "infer", "inference", "predict", "complete"), "generate"),
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
    for index, word in enumerate(words):
        if word.startswith("-"):
            raise _option(name, word, words[index + 1 :])
        if not os.path.exists(word) and command.words in ("", RECIPE):
            _require_joined(name, word, words[index + 1 :])
        if "=" not in word and not command.words:
            raise InputError(f"{shown(word)}: expected key=value; {name} takes settings only (a value with spaces goes in quotes)")


def _require_joined(name: str, word: str, after: Sequence[str]) -> None:
    """Raise InputError for "key value", "key: value", "key = value" and the like, of which `word` is the first part."""
    key, *rest = re.split("[:=]", word, maxsplit=1)
    value, typed = "".join(rest), word
    if not value and after:
        value = after[0][1:] or " ".join(after[1:2]) if after[0].startswith("=") else _value(after)
        typed = f"{word} {after[0]}"
    if "=" in word and (typed == word or not value):
        return
    if right := key if "=" in word or (not value and key in _known(name)) else _meant(name, key) if value else "":
        raise InputError(f"{shown(typed)}: settings are written key=value, without spaces: {right}={value or '...'}")


def _option(name: str, word: str, after: Sequence[str]) -> InputError:
    key, equals, value = word.lstrip("-").partition("=")
    if COMMANDS[name].words == RECIPE and key in OF_A_RECIPE:
        return InputError(f"{word}: a recipe is given by its name alone: adept-fast {name} {value or ' '.join(after[:1]) or RECIPE}")
    key, value = key.replace("-", "_"), value if equals else _value(after)
    if right := _meant(name, key):
        return InputError(f"{word}: settings are written key=value, without dashes: {right}={value or '...'}")
    answer = hint(key, _known(name)) or f"settings are written key=value (adept-fast {name} --help lists them)"
    return InputError(f"unknown option {word}: {answer}")


def _value(after: Sequence[str]) -> str:
    """Return the next word, unless it is a setting, an option or a recipe by itself."""
    word = next(iter(after), "")
    return "" if "=" in word or word.startswith("-") or word.endswith((".yaml", ".yml")) else word


def _meant(name: str, key: str) -> str:
    """Return the key that is meant, or "" if none is near."""
    known = _known(name)
    return key if key in known else next(iter(suggestions(key, known)), "")


def _known(name: str) -> list[str]:
    return [key for kind in COMMANDS[name].declarations for key in keys_of(kind)]
