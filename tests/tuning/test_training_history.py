"""trainer_log.jsonl read for charts and tables: the last run in it, gaps as NaN, and what is no number named with its line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from adept_fast.errors import InputError
from adept_fast.tuning.training_history import TrainingHistory

LINES = [
    {"event": "plan", "step": 0, "steps": 9, "tokens": 90},
    {"event": "step", "step": 1, "loss": 5.0, "tokens_per_second": 1.0},
    {"event": "end", "step": 9},
    {"event": "begin", "step": 0, "run": 2},
    {"event": "plan", "step": 0, "steps": 4, "tokens": 40},
    {"event": "refresh", "step": 0, "rates": {"a": 0.5, "b": None}},
    {"event": "evaluation", "step": 0, "general_loss": 1.5, "law_loss": 2.5},
    {"event": "step", "step": 1, "loss": 3.0, "tokens_per_second": 10.0, "peak_memory": 7},
    {"event": "skipped", "step": 2, "skipped": 1},
    {"event": "step", "step": 2, "loss": None, "tokens_per_second": 30.0, "peak_memory": 9},
]


def load(folder: Path, *lines: dict) -> TrainingHistory:
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingHistory.load(folder / "trainer_log.jsonl")


def test_the_last_run_counts(tmp_path: Path) -> None:
    found = load(tmp_path, *LINES)
    assert found.plan == {"steps": 4, "tokens": 40} and (found.done, found.ended, found.skipped) == (2, False, 1)
    assert found.training.steps == (1, 2) and found.training.values[0] == 3.0 and math.isnan(found.training.values[1])
    assert {name: curve.values for name, curve in found.monitored.items()} == {"general": (1.5,), "law": (2.5,)}
    assert found.refreshes[0].rates["a"] == 0.5 and math.isnan(found.refreshes[0].rates["b"])
    assert (found.speed, found.peak_memory) == (20.0, 9)
    assert TrainingHistory.load(tmp_path / "none.jsonl") == TrainingHistory()


@pytest.mark.parametrize("line, said", [
    ({"event": "refresh", "step": 3, "rates": {"a": "x"}}, "rates.a is no number, but 'x'"),
    ({"event": "refresh", "step": 3, "rates": [1]}, r"rates is no table, but \[1\]"),
    ({"event": "evaluation", "step": 3, "law_loss": True}, "law_loss is no number, but True"),
    ({"event": "forgetting", "step": 3, "meter_bound": {"a": {}}}, "meter_bound.a is no number, but {}"),
])  # fmt: skip
def test_what_is_no_number_is_named_with_its_line(tmp_path: Path, line: dict, said: str) -> None:
    with pytest.raises(InputError, match=f"trainer_log.jsonl:11: {said}: remove that line"):
        load(tmp_path, *LINES, line)
