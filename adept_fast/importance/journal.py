"""What a long scoring run has measured so far, one line an item, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from adept_fast.artefacts import write_text


class Journal:
    """Append-only JSON lines: a header that says what the rows belong to, then one row an item, in order.

    Rows under another header, and a last line that was cut off, are dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        first = json.dumps({"journal": header}, sort_keys=True)
        if lines and lines[0] == first:
            self.rows = list(_whole(lines[1:-1]))  # what follows the last newline is not whole
        write_text(path, first + "\n" + "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Rows up to the first malformed line."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
