"""The command `adept-fast`. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 128 + N stopped by signal N.

An error is one line on stderr; --debug adds the traceback. commands.py lists the subcommands and how to add one.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.stop_signals import Stopped, stopping_on_signals
from adept_fast.cli.surroundings import check_surroundings
from adept_fast.cli.typed import asked_for, command_of, require_settings
from adept_fast.errors import InputError
from adept_fast.runtime.console import LAST, attached, open_missing
from adept_fast.runtime.disk_errors import REMEDIES, DiskError, disk_error_line, errno_of

WRITE_AT_THE_END = ("copies", "compare", "plan", "generate")  # or nothing

logger = logging.getLogger(__name__)


@attached()
def main(argv: Sequence[str] | None = None) -> int:
    open_missing()
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word != "--debug"]
    try:
        with stopping_on_signals():
            said = asked_for(words) or _run(*command_of(words))
            if said:
                logger.info(said, extra=LAST)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        state = "nothing was written" if words[0] in WRITE_AT_THE_END else "the same command goes on from here"
        logger.error(f"{'interrupted' if number == signal.SIGINT else f'stopped by {signal.Signals(number).name}'}; {state}")
        return 128 + number
    except BaseException as error:
        if "--debug" in given or isinstance(error, SystemExit):
            raise
        logger.error(_one_line(error))
        return 2 if isinstance(error, InputError) else 1
    return 0


def _run(name: str, words: Sequence[str]) -> str | None:
    command = COMMANDS[name]
    require_settings(name, words)
    if not command.light:
        check_surroundings(name)
    said: str | None = import_module(f"adept_fast.cli.{command.module}").run(name, words)
    return said


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, InputError | DiskError):
        return text
    if isinstance(error, OSError) and error.errno in REMEDIES and error.filename is not None:
        return disk_error_line(error.filename, error.errno)
    if (number := errno_of(error)) in REMEDIES:
        text += f": {REMEDIES[number]}, then the same command goes on"
    return f"{type(error).__name__}: {text} (--debug shows where)"
