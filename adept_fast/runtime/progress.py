"""How far a stage has come: a bar on a terminal or in a notebook; elsewhere (a log file, CI) a line of news every half minute."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

from adept_fast.runtime import distributed
from adept_fast.runtime.console import PACKAGE, outliving

CALM = 30  # seconds between two lines, and before the first

logger = logging.getLogger(__name__)


class Progress(tqdm):  # type: ignore[type-arg]  # only its stubs are generic
    """tqdm, which see for the options. Of several processes only the first one shows it, and none where the level of the logger
    "adept_fast" was set above INFO."""

    def __init__(self, *given: Any, disable: bool = False, **options: Any) -> None:
        self.plain = not (sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel."))
        if self.plain:
            line = "{desc}: {percentage:.0f} % done, {remaining} left"
            options |= {"mininterval": CALM, "delay": CALM, "miniters": 1, "leave": False, "bar_format": line}
        silenced = logging.getLogger(PACKAGE).level > logging.INFO
        options["disable"] = disable or silenced or not distributed.leads()
        super().__init__(*given, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.plain:
            with outliving(sys.stderr):
                super().display(msg, pos)
        elif msg is None:
            logger.info(str(self))
