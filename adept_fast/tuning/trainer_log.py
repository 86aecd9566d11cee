"""Read and write trainer_log.jsonl: one complete line an event. A resumed run cuts the lines after its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.disk_errors import as_disk_error
from adept_fast.runtime.input_files import read_text, regular
from adept_fast.runtime.strict_json import dumps, finite
from adept_fast.settings.validation import shown

NUMBERS = ("loss", "learning_rate", "steps", "tokens", "epochs", "documents", "tokens_per_second", "peak_memory", "seconds")
"""Keys of an entry that hold numbers, or null."""
BEGIN = '{"event": "plan"'


class TrainerLog:
    """An append-only file of JSON lines, each with "step" and "event".

    Events: plan, step, sources, refresh, forgetting, evaluation, skipped, end; "begin" where another run follows in the same file. Numbers
    that are not finite are null. Raises InputError for a path that exists and is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            regular(path)
        self.path = path

    def require_own(self) -> None:
        """Raise InputError where the file is not the log of a run, because a new run would overwrite it."""
        if self.path.is_file():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                first = file.read(len(BEGIN))
            if not BEGIN.startswith(first):
                raise InputError(f"{self.path}: not the log of a run, which would overwrite it: rename it, or choose another output_dir")

    def cut(self, step: int) -> None:
        """Drop the last run's lines after `step`, its end, and an incomplete last line."""
        if self.path.is_file():
            whole, entries = self._read()
            begun = max((index for index, entry in enumerate(entries) if entry["event"] == "begin"), default=0)
            lines = [
                line
                for index, (line, entry) in enumerate(zip(whole, entries, strict=True))
                if index < begun or (entry["step"] <= step and entry["event"] != "end")
            ]
            write_text(self.path, "".join(line + "\n" for line in lines))

    def count(self, event: str, until: int) -> int:
        """Count the last run's lines of an event up to a step."""
        if not self.path.is_file():
            return 0
        _, entries = self._read()
        begun = max((index for index, entry in enumerate(entries) if entry["event"] == "begin"), default=0)
        return sum(entry["event"] == event and entry["step"] <= until for entry in entries[begun:])

    def begin(self) -> None:
        """Mark where a new run begins, in a file that holds the steps of an earlier one."""
        if self.path.is_file():
            _, entries = self._read()
            if any(entry["step"] > 0 or entry["event"] == "end" for entry in entries):
                self.write("begin", 0, run=sum(entry["event"] == "begin" for entry in entries) + 2)

    def planned_steps(self) -> int | None:
        """Return the steps of the last plan; None without one."""
        entries = self._read()[1] if self.path.is_file() else []
        return next((entry.get("steps") for entry in reversed(entries) if entry["event"] == "plan"), None)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the complete lines, as text and parsed."""
        return read_text(self.path).split("\n")[:-1], read_log(self.path)

    def write(self, event: str, step: int, **content: Any) -> None:
        """Append a line. Raises DiskError, which names the file, where the disk refuses it or the folder was removed."""
        line = dumps({"event": event, "step": step, **finite(content)})
        with as_disk_error(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the entries of trainer_log.jsonl; none without a file. An incomplete last line, which a killed run leaves, is left out.

    Raises InputError, which names the line, for a malformed entry.
    """
    if not path.is_file():
        return []
    entries = []
    for count, line in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{count}: not valid JSON ({error}): remove that line") from None
        step, event = (entry.get("step"), entry.get("event")) if isinstance(entry, dict) else (None, None)
        if type(step) is not int or step < 0 or not isinstance(event, str):
            raise InputError(f'{path}:{count}: expected an object with a whole "step" and an "event": remove that line')
        wrong = next((key for key in NUMBERS if not isinstance(entry.get(key), int | float | None)), None)
        if wrong is not None:
            raise InputError(f"{path}:{count}: {wrong} is no number, but {shown(entry[wrong])}: remove that line")
        entries.append(entry)
    return entries
