"""trainer_log.jsonl: one line an event, whole lines only; on resume, what lies past the checkpoint is cut off."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from adept_fast.runtime.atomic_files import write_text


class TrainerLog:
    """Append-only JSON lines, each with "step" and "event": plan, step, sources, refresh, forgetting, evaluation, end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop lines past `step`, the end of an earlier run, and a last line that was not whole."""
        if self.path.is_file():
            whole = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            entries = [json.loads(line) for line in whole]
            kept = [line for line, entry in zip(whole, entries, strict=True) if entry["step"] <= step and entry["event"] != "end"]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, event: str, step: int, **content: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "step": step, **_finite(content)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _finite(content: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
