"""Progress of a stage: a bar in a terminal or notebook, a line every half minute elsewhere (log files, CI)."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

from adept_fast.runtime import distributed
from adept_fast.runtime.console import PACKAGE, outliving

INTERVAL = 30  # seconds before the first line, and between lines

logger = logging.getLogger(__name__)


class Progress(tqdm):  # type: ignore[type-arg]  # only its stubs are generic
    """tqdm with its options. Of several processes only the first shows it; none does if the logger "adept_fast" is above INFO."""

    def __init__(self, *given: Any, disable: bool = False, **options: Any) -> None:
        self.plain = not (sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel."))
        if self.plain:
            line = "{desc}: {percentage:.0f} % done, {remaining} left"
            options |= {"mininterval": INTERVAL, "delay": INTERVAL, "miniters": 1, "leave": False, "bar_format": line}
        silenced = logging.getLogger(PACKAGE).level > logging.INFO
        options["disable"] = disable or silenced or not distributed.is_main()
        super().__init__(*given, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.plain:
            with outliving(sys.stderr):
                super().display(msg, pos)
        elif msg is None:
            logger.info(str(self))
