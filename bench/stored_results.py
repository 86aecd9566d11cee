"""Store the results of a long benchmark in a JSON file, so that the same command resumes after a deadline or a kill."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class StoredResults:
    """Results by key. Measuring another one after `--seconds` ends the program."""

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--into", type=Path, required=True, metavar="FILE", help="stores the results")
        parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time; the same command resumes")

    def __init__(self, given: argparse.Namespace) -> None:
        self.path, self.end = given.into, time.monotonic() + given.seconds
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.found:
            if time.monotonic() > self.end:
                raise SystemExit(f"{len(self.found)} results so far, {key} is next: run the same command again")
            self.found[key] = make()
            self.path.write_text(json.dumps(self.found, allow_nan=False))
        return self.found[key]
