"""In one run each thing is done once: the plan is made, a model is loaded and asked whether it is causal, config.json is read."""

from __future__ import annotations

import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adept_fast.checkpoints import checkpoint
from adept_fast.cli.main import main
from adept_fast.evaluation.paired_items import load_items
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.models import causality
from adept_fast.runtime import input_files
from adept_fast.tuning import training_plan
from tests.support import tiny_models

pytestmark = pytest.mark.slow
COMMON = [
    *("expand.k=1", "tune.max_steps=2", "tune.refresh_steps=1", "tune.block_size=32"),
    *("tune.max_items=4", "score.max_items=6", "eval.answer_tokens=2"),
]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each was done, models and config.json by the name of their folder."""
    found: Counter[str] = Counter()

    def count(holder: Any, name: str, key: Callable[..., str | None]) -> None:
        original = getattr(holder, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if (what := key(*args, **kwargs)) is not None:
                found[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, counted)

    count(checkpoint, "load_model", lambda folder, *_: f"load {Path(folder).name}")
    count(causality, "_gradient_norms", lambda model: "causality")
    def config(path: str | Path, *_: Any, **__: Any) -> str | None:
        return f"config of {Path(path).parent.name}" if Path(path).name == "config.json" else None

    count(input_files, "read_text", config)
    count(AutoTokenizer, "from_pretrained", lambda *_, **__: "tokenizer")
    count(training_plan, "document_order", lambda *_: "plan")
    return found


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model", "qwen2")
    texts = [f"{sentence} </s> It is note {number}." for number, sentence in enumerate(tiny_models.SENTENCES * 2)]
    Path("notes.txt").write_text("\n\n".join(texts))
    return ["run", "model_name_or_path=model", "domain=notes.txt", "output_dir=out", *COMMON]


def test_one_run_does_each_thing_once(given: list[str], counts: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "score.compare=[gate]", "score.units=tensor", "score.unit_layers=[1]"]) == 0
    assert counts["plan"] == counts["tokenizer"] == 1, counts
    assert {name: count for name, count in counts.items() if name.startswith("load")} == {
        "load model": 2,  # for scores, units and expansion; and, once nothing holds it any more, for the evaluation
        "load expanded": 1,  # proven, then trained
        "load tuned": 1,
    }
    assert counts["causality"] == 4, "once for each model that was loaded"
    assert counts["config of model"] == 1 and counts["config of expanded"] <= 3 and counts["config of tuned"] <= 3, counts
    assert capsys.readouterr().out.count("control tokens stand in the text") == 1


def test_a_second_run_loads_no_model(given: list[str], counts: Counter[str]) -> None:
    assert main(given) == 0
    counts.clear()
    assert main(given) == 0
    assert not [name for name in counts if name.startswith("load") or name == "plan"], counts


def test_a_method_without_copies_loads_its_base_twice(given: list[str], counts: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main([*given, "method=lora"]) == 0
    assert (counts["load model"], counts["load tuned"], counts["plan"]) == (2, 1, 1), "to train, and to compare and evaluate"
    assert re.search("took .* at most: read [^,]*, tune [^,]*, eval [^,]*$", capsys.readouterr().out.strip())


def test_a_model_that_leaks_is_planned_once_more(given: list[str], counts: Counter[str], tmp_path: Path) -> None:
    tiny_models.checkpoint(tmp_path / "bloom", "bloom", n_layer=4, n_head=4)
    assert main([*given, "model_name_or_path=bloom"]) == 0
    assert counts["plan"] == 2


def test_an_evaluation_of_a_changed_model_is_made_again(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 0
    capsys.readouterr()
    assert main(["eval", *given[1:]]) == 0 and "eval.json: up to date" in capsys.readouterr().out
    weights = Path("out/tuned/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert main(["eval", *given[1:]]) == 0 and "up to date" not in capsys.readouterr().out


@pytest.mark.nightly
def test_an_evaluation_of_the_earlier_schema_is_made_again(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 0
    path = Path("out/eval.json")
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: whole[key] for key in ("inputs", "seconds")} | {"schema": 1, "models": {}}))
    capsys.readouterr()
    assert main(["eval", *given[1:]]) == 0 and "up to date" not in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again | {"seconds": 0} == whole | {"seconds": 0} and whole["changes"]["tuned"]["domain"]["loss"]["value"] != 0
    assert load_items(path, EvaluationResults.load(path)).keys() == {"base", "tuned"}


def test_memory_holds_one_model_at_a_time(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load, loaded = checkpoint.load_model, []

    def watched(*args: Any) -> Any:
        assert not [name for name, model in loaded if model() is not None]
        model = load(*args)
        loaded.append((str(args[0]), weakref.ref(model)))
        return model

    monkeypatch.setattr(checkpoint, "load_model", watched)
    assert main(given) == 0 and len(loaded) > 2
