"""Tasks of lm-eval: found by name with their data, or refused in one line, and compared over pairs of items."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'adept-fast[eval]'")
from lm_eval.api.metrics import weighted_perplexity

from adept_fast.errors import InputError
from adept_fast.evaluation.lm_tasks import _resampled, load_tasks

pytestmark = pytest.mark.slow


def write_task(folder: Path, name: str, rows: list[dict], **config: object) -> Path:
    """A task of a local file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}))
    return folder


def choice_task(folder: Path, count: int = 12) -> Path:
    rows = [
        {"question": f"Stones of fox {number}:", "choices": [f" {number}", f" {number * 7}", " none"], "answer": number % 3}
        for number in range(count)
    ]
    asked = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return write_task(folder, "stones", rows, **asked, metric_list=metrics)


def text_task(folder: Path) -> Path:
    rows = [{"text": f"The heron number {number} walks to the river."} for number in range(6)]
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    asked = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    return write_task(folder, "rivers", rows, **asked, metric_list=[metric])


def test_the_digest_is_that_of_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = str(choice_task(tmp_path / "tasks"))
    whole, some = (load_tasks(["stones"], limit, folder).digest for limit in (None, 3))
    assert whole == load_tasks(["stones"], None, folder).digest != some
    choice_task(tmp_path / "tasks", 13)
    assert load_tasks(["stones"], None, folder).digest != whole and load_tasks(["stones"], 3, folder).digest == some


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = choice_task(tmp_path / "tasks")
    with pytest.raises(InputError, match="^tasks: lm-eval has no task hellaswagg: did you mean hellaswag"):
        load_tasks(["hellaswagg"], None, str(folder))
    with pytest.raises(InputError, match="^tasks_include_path must be a folder with YAML files of tasks, found .*none$"):
        load_tasks(["stones"], None, str(tmp_path / "none"))
    (folder / "stones.jsonl").unlink()
    with pytest.raises(InputError, match="^tasks: lm-eval cannot load stones .*its data must be at hand or on a hub$"):
        load_tasks(["stones"], None, str(folder))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"eval.tasks needs lm_eval: pip install 'adept-fast\[eval\]'"):
        load_tasks(["stones"], None, None)


def test_a_metric_that_is_no_mean_is_resampled_over_pairs() -> None:
    pairs = [((-2.0 * words, words), (-1.5 * words, words)) for words in range(1, 9)]
    value = math.exp(1.5) - math.exp(2.0)
    change = _resampled(weighted_perplexity, pairs, value)
    assert (change.low, change.high) == pytest.approx((value, value)), "each item changed alike"
    pairs[0] = ((-2.0, 1), (-9.0, 1))
    change = _resampled(weighted_perplexity, pairs, value)
    assert change.low < change.high and change == _resampled(weighted_perplexity, pairs, value)
