"""Progress of a stage: one bar in a terminal or notebook, a line every half minute elsewhere (log files, CI).

Of bars inside each other the innermost is shown, in the same line. On a terminal the line is erased when the last one ends, and while a
message is printed. A notebook keeps one output with the outermost.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from tqdm import tqdm

from adept_fast.runtime import distributed
from adept_fast.runtime.console import PACKAGE, bars, replace_line

INTERVAL = 30  # seconds before the first line, and between lines
DELAY = 1  # seconds before a bar: short stages show none
ECHO = 3  # columns left free, so that the ^C that a terminal echoes stays in the bar's line

logger = logging.getLogger(__name__)


class Progress(tqdm):  # type: ignore[type-arg]  # only its stubs are generic
    """tqdm with its options. Of several processes only the first shows it; none does if the logger "adept_fast" is above INFO.

    Use it as a context manager, so that an exception closes it.
    """

    monitor_interval = 0  # tqdm's thread would draw between the messages
    output: Any = None  # the notebook's output, which the open bars share

    def __init__(self, *given: Any, disable: bool = False, **options: Any) -> None:
        self.notebook = type(sys.stderr).__module__.startswith("ipykernel.")
        self.plain = not self.notebook and (not sys.stderr.isatty() or os.environ.get("TERM") == "dumb")
        self.drawn = False
        options |= {"miniters": 1, "leave": False, "delay": DELAY}
        if self.plain:
            line = "{desc}: {percentage:.0f} % done, {remaining} left"
            options |= {"mininterval": INTERVAL, "delay": INTERVAL, "bar_format": line}
        silenced = logging.getLogger(PACKAGE).level > logging.INFO
        options["disable"] = disable or silenced or not distributed.is_main()
        if not options["disable"] and not self.plain:
            bars.append(self)
        super().__init__(*given, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.plain:
            logger.info(str(self))
        elif bars and bars[-1] is self:
            self.drawn = True
            self._draw()

    def hide(self) -> None:
        """Erase the bar from a terminal's line."""
        if self.drawn and not self.notebook:
            replace_line("")

    def show(self) -> None:
        """Draw the bar again where it was drawn before."""
        if self.drawn:
            self._draw()

    def close(self) -> None:
        if self.disable:
            return
        self.disable = True
        if self.plain:
            return
        self.hide()
        bars[:] = [bar for bar in bars if bar is not self]
        if bars:
            bars[-1].show()
        elif Progress.output is not None:
            self._draw()
            Progress.output = None

    def _draw(self) -> None:
        if self.notebook:
            from IPython.display import display

            content = {"text/plain": str(self)}
            if Progress.output is None:
                Progress.output = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
            else:
                Progress.output.update(content, raw=True)
            return
        self.ncols = _columns() - ECHO
        replace_line(str(self))


def _columns() -> int:
    """Return the width of the terminal; 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
