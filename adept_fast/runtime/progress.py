"""How far a stage has come, on stderr: a bar on a terminal; elsewhere (a log file, CI, a notebook) a plain line every half minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from adept_fast.runtime import distributed
from adept_fast.runtime.console import outliving

CALM = 30  # seconds between two lines, and before the first


class Progress(tqdm):
    """tqdm, which see for the options. Of several processes the first one shows its own; quiet: none does."""

    def __init__(self, *given: Any, quiet: bool = False, **options: Any) -> None:
        self.plain = not sys.stderr.isatty()
        if self.plain:
            line = "{desc}: {percentage:.0f} % done, {remaining} left"
            options |= {"mininterval": CALM, "delay": CALM, "miniters": 1, "leave": False, "bar_format": line}
        options["disable"] = quiet or not distributed.leads()
        super().__init__(*given, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        with outliving(sys.stderr):
            if not self.plain:
                super().display(msg, pos)
            elif msg is None:
                print(self, file=self.fp, flush=True)
