"""trainer_log.jsonl: one line an event, whole lines only; on resume, what lies past the checkpoint is cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.disk_errors import naming
from adept_fast.runtime.input_files import read_text, regular
from adept_fast.runtime.strict_json import dumps, finite
from adept_fast.settings.validation import shown

NUMBERS = ("loss", "learning_rate", "steps", "tokens", "epochs", "documents", "tokens_per_second", "peak_memory", "seconds")
"""Keys of an entry that hold numbers, or null."""
BEGIN = '{"event": "plan"'


class TrainerLog:
    """Append-only JSON lines, each with "step" and "event": plan, step, sources, refresh, forgetting, evaluation, skipped, end; "begin"
    where another run follows in the same file. A number that is not finite stands there as null.

    Raises InputError for a path that is there and no regular file."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            regular(path)
        self.path = path

    def require_own(self) -> None:
        """Raise InputError where the file is not the log of a run: a new run would overwrite it."""
        if self.path.is_file():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                first = file.read(len(BEGIN))
            if not BEGIN.startswith(first):
                raise InputError(f"{self.path}: not the log of a run, which would overwrite it: rename it, or choose another output_dir")

    def cut(self, step: int) -> None:
        """Of the last run in the file drop lines past `step`, its end, and a last line that was not whole."""
        if self.path.is_file():
            whole, entries = self._read()
            begun = max((index for index, entry in enumerate(entries) if entry["event"] == "begin"), default=0)
            kept = [
                line
                for index, (line, entry) in enumerate(zip(whole, entries, strict=True))
                if index < begun or (entry["step"] <= step and entry["event"] != "end")
            ]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def count(self, event: str, until: int) -> int:
        """How many lines of an event the last run has up to a step."""
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
        """Of the last plan."""
        entries = self._read()[1] if self.path.is_file() else []
        return next((entry.get("steps") for entry in reversed(entries) if entry["event"] == "plan"), None)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Whole lines, as they stand and as they read."""
        return read_text(self.path).split("\n")[:-1], read_log(self.path)

    def write(self, event: str, step: int, **content: Any) -> None:
        """Raises DiskError, which names the file, for what the disk refuses, as where the folder was removed meanwhile."""
        line = dumps({"event": event, "step": step, **finite(content)})
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of trainer_log.jsonl; none without a file. A last line that is not whole, as a killed run leaves it, is left out.

    Raises InputError naming the line that is none of a log.
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
