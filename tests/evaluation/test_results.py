"""eval.json: what is written is read back, the earlier form and damage are named, and items' losses belong to it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adept_fast.errors import InputError
from adept_fast.evaluation.paired_items import ItemLosses, items_path, load_items, save_items
from adept_fast.evaluation.results import (
    Answer,
    Change,
    CorpusChange,
    Dial,
    EvaluationResults,
    Measured,
    ModelChange,
    ModelResult,
    Task,
    TaskMetric,
    Tried,
)

TEXTS = Measured(2.0, 1.5, 2.5, 7.4, 8, 2, None)
QUESTIONS = Measured(1.0, 0.5, 1.5, 2.7, 4, 2, 0.5, 0.0, 1.0)
BASE = ModelResult(QUESTIONS, None, TEXTS, {"law": TEXTS})
CHANGE = CorpusChange(Change(-0.5, -0.75, -0.25), None)
METRIC = TaskMetric(0.5, 0.75, Change(0.25, 0.0, 0.5), True)
RESULTS = EvaluationResults(
    models={
        "base": BASE,
        "expanded": replace(BASE, shifted_tokens=0.0, same_as="base", reason="proven"),
        "tuned": replace(BASE, shifted_tokens=0.1),
    },
    changes={"tuned": ModelChange(CorpusChange(Change(0.0, -1.0, 1.0), Change(0.1, 0.05, 0.15)), CHANGE, {"law": CHANGE})},
    seconds=1.5,
    inputs={"model": "m", "expanded": True},
    versions={"torch": "2"},
    answers=(Answer("How\nmany?", "general", "Four.", "Five.", None),),
    tasks={"sums": Task(4, {"acc,none": METRIC})},
    dial=Dial(0.5, 1.1, 0.1, 0.05, 0.15, limit=0.2, tried=(Tried(1.0, 1.5, 0.5, 0.25, 0.75), Tried(0.5, 1.1, 0.1, 0.05, 0.15))),
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "eval.json")
    assert EvaluationResults.load(tmp_path / "eval.json") == RESULTS
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["schema"] == 2 and content["models"]["expanded"] == {"same_as": "base", "reason": "proven"}
    assert content["models"]["base"]["shifted_tokens"] is None and content["answers"][0]["from"] == "general"
    assert content["changes"]["tuned"]["domain"] == {"loss": {"value": -0.5, "low": -0.75, "high": -0.25}, "accuracy": None}
    assert CHANGE.loss.certain and not RESULTS.changes["tuned"].general.loss.certain


@pytest.mark.parametrize("entry, value, said", [
    ("schema", 1, "schema 1 is not the known 2"),
    ("models", [], "models is []"),
    ("models.base.general.loss", "2", "models.base.general.loss is '2'"),
    ("models.base.general.loss", float("nan"), "models.base.general.loss is nan"),
    ("models.base.general.items", True, "models.base.general.items is True"),
    ("models.tuned.also.law.low", None, "models.tuned.also.law.low is None"),
    ("models.tuned.also", {}, "models.tuned has general, domain, not general, domain, law"),
    ("models.expanded.same_as", "expanded", "models.expanded.same_as is 'expanded'"),
    ("models.expanded.same_as", ["base"], "not as it was written"),
    ("changes", {}, "changes has [], not ['tuned']"),
    ("changes.tuned.general.loss", {"value": 1, "low": 0}, "changes.tuned.general.loss.high is missing"),
    ("answers", {"a": 1}, "answers is {'a': 1}"),
    ("answers", [{"prompt": 3}], "answers[0].from is missing"),
    ("tasks.sums.metrics.acc,none.higher_is_better", 1, "tasks.sums.metrics.acc,none.higher_is_better is 1"),
    ("dial.tried", [3], "dial.tried[0] is 3"),
    ("dial.extra", 3, "dial.extra is no entry of it"),
    ("versions.torch", 2, "versions.torch is 2"),
])  # fmt: skip
def test_the_entry_at_fault_is_named(tmp_path: Path, entry: str, value: Any, said: str) -> None:
    path = tmp_path / "eval.json"
    RESULTS.save(path)
    content = json.loads(path.read_text())
    *tables, last = entry.split(".")
    table = content
    for name in tables:
        table = table[name]
    table[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}: ')}.*{re.escape(said)}.*: restore it, or delete it and run "):
        EvaluationResults.load(path)


def test_items_belong_to_their_results(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"

    def corpora(law: float = 8.0) -> dict[str, ItemLosses]:
        def losses(sums: list[float], tokens: int, right: list[float] | None = None) -> ItemLosses:
            half = [torch.tensor(each, dtype=torch.float64) for each in (sums, right) if each is not None]
            return ItemLosses(half[0], torch.tensor([tokens, tokens]), *half[1:])

        return {"general": losses([1.0, 3.0], 2, [1.0, 0.0]), "domain": losses([8.0, 8.0], 4), "law": losses([8.0, law], 4)}

    save_items(path, {"base": corpora(), "tuned": corpora()})
    found = load_items(path, RESULTS)
    assert found.keys() == {"base", "tuned"} and found["tuned"]["law"].sums.tolist() == [8, 8]
    assert found["base"]["domain"].right is None and found["base"]["general"].right.tolist() == [1, 0]
    assert found["base"]["general"].tokens.tolist() == [2, 2]
    save_items(path, {"base": corpora(), "tuned": corpora(law=7.0)})
    with pytest.raises(InputError, match="eval.items.safetensors: .*tuned.law is not what .*eval.json has"):
        load_items(path, RESULTS)
    items_path(path).write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match="eval.items.safetensors: not as it was written"):
        load_items(path, RESULTS)


def test_a_change_is_that_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 9, (40,), generator=generator)
    sums = 50 * torch.rand(40, generator=generator, dtype=torch.float64)
    base, right = ItemLosses(sums, tokens, (sums > 20).double()), (sums > 25).double()
    change = ItemLosses(sums - tokens / 8, tokens, right).change(base)
    assert [*vars(change.loss).values()] == pytest.approx(3 * [-1 / 8], rel=1e-12), "each item changed alike: no spread at all"
    assert change.accuracy is not None and change.accuracy.value == pytest.approx(float((right - base.right).mean()))
    assert change.accuracy.low < change.accuracy.value < change.accuracy.high
