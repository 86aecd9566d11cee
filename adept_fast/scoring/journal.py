"""Journal of a scoring run: one line per measured pack of items, so that a killed run resumes where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.disk_errors import as_disk_error
from adept_fast.runtime.strict_json import dumps


class Journal:
    """Append-only JSON lines: a header that identifies the run, then one row per measurement, in the order of the run.

    A resumed run asks for the same measurements in the same order, and gets them from the file as long as there are any. Dropped are rows
    under another header, an incomplete last line, and everything from the first row that was not asked for.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self._at = path, 0
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        self._first = dumps({"journal": header}, sort_keys=True)
        self._rows = list(_whole(lines[1:-1])) if lines and lines[0] == self._first else []  # a line without a newline is incomplete
        self._file = self._rewritten()

    def recorded(self, key: Any, measure: Callable[[], Any]) -> Any:
        """Return the measurement for `key`, from the file or from `measure`. Both are JSON, in which floats keep all their bits."""
        if self._at < len(self._rows):
            row = self._rows[self._at]
            if row["key"] == key:
                self._at += 1
                return row["measured"]
            del self._rows[self._at :]
            self._file.close()
            self._file = self._rewritten()
        row = {"key": key, "measured": measure()}
        with as_disk_error(self.path):
            self._file.write(dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._rows.append(row)
        self._at += 1
        return row["measured"]

    def _rewritten(self) -> TextIO:
        write_text(self.path, self._first + "\n" + "".join(dumps(row) + "\n" for row in self._rows))
        return self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows up to the first malformed line."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
