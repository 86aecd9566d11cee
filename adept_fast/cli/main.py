"""The command `adept-fast`. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 128 + N stopped by signal N.

An error is one line on stderr; --debug adds the traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from adept_fast.cli.stop_signals import Stopped, stopping_on_signals
from adept_fast.errors import InputError
from adept_fast.runtime.console import attached, open_missing
from adept_fast.runtime.disk_errors import REMEDIES, DiskError, disk_error_line, errno_of

MODEL = ("model_name_or_path",)
HF = ("accelerate", "jinja2", "matplotlib", "safetensors", "tqdm", "transformers", "xxhash", "yaml")  # modules of the extra [hf]
SHARED = ("score", "tune")  # commands that several processes, started by accelerate or torchrun, run together
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "demo": ("the whole method on a small real model, in minutes", "adept-fast demo output_dir=adept_demo", ()),
    "score": ("which layers general competence rests on", "adept-fast score model_name_or_path=MODEL score.max_items=64", MODEL),
    "expand": (
        "copy the chosen layers, silent at first, and verify",
        "adept-fast expand model_name_or_path=MODEL expand.layers=[3,7]",
        MODEL,
    ),
    "verify": ("check that base and expanded model agree bit for bit", "adept-fast verify model_name_or_path=MODEL dtype=bfloat16", MODEL),
    "tune": (
        "train the copies on the domain, each unit at its own rate",
        "adept-fast tune recipe.yaml tune.max_steps=100",
        (*MODEL, "domain"),
    ),
    "eval": ("loss, perplexity and accuracy of base and tuned model", "adept-fast eval recipe.yaml eval.max_items=200", MODEL),
    "run": (
        "score, expand, verify, tune, evaluate, report",
        "adept-fast run model_name_or_path=MODEL domain=my.txt output_dir=out",
        (*MODEL, "domain"),
    ),
    "copies": (
        "remove, extract, apply, merge or dial copies on disk",
        "adept-fast copies remove source=out/tuned target=plain (adept-fast copies ACTION --help has one for each)",
        (),
    ),
    "report": ("write output_dir/report.html again", "adept-fast report output_dir=out", ()),
    "compare": ("several runs side by side, with the spread over seeds", "adept-fast compare out/a out/b output_dir=out/compare", ()),
    "info": ("versions, and which backends were found", "adept-fast info", ()),
}

CACHES = ("ADEPT_FAST_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME")


logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """A parser whose error for an unknown --option states how settings are written."""

    def error(self, message: str) -> NoReturn:
        super().error(message + "; settings are written key=value" * message.startswith("unrecognized arguments"))


def parser() -> argparse.ArgumentParser:
    from adept_fast import __version__
    from adept_fast.cli.copies import ACTIONS

    top = Parser(
        prog="adept-fast",
        description="Adapt a causal language model to a domain without losing what it knows: score -> expand -> tune -> report.",
        epilog="example: adept-fast run model_name_or_path=MODEL domain=my.txt output_dir=out",
    )
    top.set_defaults(debug=False, action=None)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, (what, example, _) in COMMANDS.items():
        command = _add_command(commands, name, what, example)
        if name == "copies":
            actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
            for action, about in ACTIONS.items():
                keys = ", ".join(entry.name for entry in fields(about.keys))
                _add_command(actions, action, about.what, f"adept-fast copies {action} {about.example}").add_argument(
                    "settings", nargs="*", metavar="key=value", help=f"keys: {keys}"
                )
        elif name == "compare":
            command.add_argument("settings", nargs="+", metavar="FOLDER | output_dir=FOLDER", help="runs, and where to write")
        elif name != "info":
            given, what = "recipe.yaml | ", "a recipe, and settings that override it"
            if name == "demo":
                given, what = "", "settings that override the demo's"
            command.add_argument("settings", nargs="*", metavar=f"{given}key.sub=value", help=f"{what} (all: docs/reference/recipe.md)")
    return top


def _add_command(parsers: argparse._SubParsersAction[Parser], name: str, what: str, example: str) -> Parser:
    described = parsers.add_parser(name, help=what, description=what, epilog=f"example: {example}")
    described.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return described


@attached()
def main(argv: Sequence[str] | None = None) -> int:
    try:
        given = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    open_missing()
    try:
        with stopping_on_signals():
            _run(given.command, given.action, getattr(given, "settings", []))
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        state = "nothing was written" if given.command in ("copies", "compare") else "the same command goes on from here"
        logger.error(f"{'interrupted' if number == signal.SIGINT else f'stopped by {signal.Signals(number).name}'}; {state}")
        return 128 + number
    except BaseException as error:
        if given.debug or isinstance(error, SystemExit):
            raise
        logger.error(_one_line(error))
        return 2 if isinstance(error, InputError) else 1
    return 0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, InputError | DiskError):
        return text
    if isinstance(error, OSError) and error.errno in REMEDIES and error.filename is not None:
        return disk_error_line(error.filename, error.errno)
    if (number := errno_of(error)) in REMEDIES:
        text += f": {REMEDIES[number]}, then the same command goes on"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _run(command: str, action: str | None, settings: Sequence[str]) -> None:
    if command == "info":
        from adept_fast.cli.info import describe

        logger.info(describe())
        return
    _require_extra()
    _require_caches()
    _quiet_libraries()
    if action is not None:
        from adept_fast.cli import copies

        logger.info(copies.run(action, settings))
        return
    if command == "compare":
        from adept_fast.report.compare_runs import compare

        keys = [setting for setting in settings if setting.startswith("output_dir=")]
        target = keys[-1].partition("=")[2] if keys else "comparison"
        logger.info(f"comparison: {compare([setting for setting in settings if setting not in keys], target)}")
        return
    from adept_fast.pipeline import recipe
    from adept_fast.pipeline.run import STAGES
    from adept_fast.pipeline.run_directory import RunDirectory
    from adept_fast.settings.key_value import overridden

    files = [setting for setting in settings if "=" not in setting or os.path.isfile(setting)]
    if len(files) > 1:
        raise InputError(f"one recipe at most, found {', '.join(files)} (a setting is written key=value)")
    overrides = [setting for setting in settings if setting not in files]
    if command == "demo":
        from adept_fast.cli import demo

        if files:
            raise InputError(f"{files[0]}: demo takes settings only; for a recipe use adept-fast run")
        demo.run(overrides)
        return
    for override in overridden(overrides):
        logger.warning(f"{override}: given again later, where it counts")
    given = recipe.load(files[0] if files else None, overrides, COMMANDS[command][2])
    directory = RunDirectory(given.folder)
    if command not in SHARED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{command} runs in one process; {' and '.join(SHARED)} take several: start {command} without a launcher")
    with directory.held():
        STAGES[command](given, directory)


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in HF if find_spec(name) is None]
    if missing:
        raise InputError(f"the command line needs {', '.join(missing)}: pip install 'adept-fast[hf]'")


def _require_caches() -> None:
    """Raise InputError for a cache variable whose folder cannot be made, which libraries would only find out after hours.

    A read-only folder passes: it may be shared on purpose.
    """
    for name in CACHES:
        folder = os.path.abspath(os.path.expanduser(os.environ.get(name) or "."))
        above = folder
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above) or (above != folder and not os.access(above, os.W_OK | os.X_OK)):
            why = "is no folder" if not os.path.isdir(above) else "cannot be written to"
            raise InputError(f"{name}={os.environ[name]} cannot be made ({above} {why}): set {name} to a folder, or unset it")


def _quiet_libraries() -> None:
    """Switch off the progress bars and warnings of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; Progress decides for itself
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
