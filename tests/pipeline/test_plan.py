"""The plan of a run: nothing is written, what is there is seen, and the counts behind the estimates are those of the run itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from adept_fast.cli.main import main
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.models.losses import corpus_loss, padded_tokens
from adept_fast.pipeline.planning.estimates import _readings
from adept_fast.pipeline.planning.suggestions import Facts, suggest
from adept_fast.pipeline.planning.text import clock, shown
from adept_fast.pipeline.planning.timing import time_masking, time_steps, typical
from adept_fast.pipeline.planning.training_memory import kept_by_layer, training_memory
from adept_fast.runtime.memory import capacity, forget_peak, peak, resident
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.packs import pack
from adept_fast.scoring.sweep import SweepPlan
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.tuning_settings import TuningSettings
from tests.support import tiny_models

TINY = ["expand.k=2", "tune.max_steps=7", "tune.refresh_steps=2", "tune.per_device_train_batch_size=2", "tune.block_size=64"]
MORE = ["tune.max_items=6", "score.max_items=12", "eval.max_items=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_models.checkpoint(folder / "model", "qwen2")
    texts = [f"{sentence} It is note {number}." for number, sentence in enumerate(tiny_models.SENTENCES * 4)]
    (folder / "notes.txt").write_text("\n\n".join(texts))
    return folder


@pytest.fixture
def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function: settings -> the plan as JSON."""
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))

    def plan(*settings: str, domain: bool = True) -> dict:
        text = [f"domain={folder / 'notes.txt'}"] if domain else []
        given = [f"model_name_or_path={folder / 'model'}", *text, f"output_dir={folder / 'out'}", *TINY, *MORE, *settings]
        capsys.readouterr()
        assert main(["plan", *given, "json=true"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return plan


def states(plan: dict) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in plan["stages"]}


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_is_planned_without_a_trace_and_what_it_leaves_is_seen(folder: Path, planned, capsys: pytest.CaptureFixture[str]) -> None:
    before = planned()
    assert not (folder / "out").exists()
    assert states(before) == {"read": "to do", "score": "to do", "expand": "to do", "tune": "to do", "eval": "to do"}
    assert before["assumed"] and before["layers"] == [1, 3] and before["training"]["tokens"] == 7 * 128
    assert all(stage["seconds"] > 0 for stage in before["stages"]) and before["seconds"] == sum(
        stage["seconds"] for stage in before["stages"]
    )
    assert before["peak"] == max(stage["peak"] or 0 for stage in before["stages"]) and before["samples"]
    settings = [f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={folder / 'out'}", *TINY, *MORE]
    assert main(["score", *settings[:1], *settings[2:]]) == 0
    scored = planned()
    assert states(scored)["score"] == "there" and not scored["assumed"]
    assert main(["run", *settings]) == 0
    took = re.search("took .* of memory at most: read .*, score .*, expand .*, tune .*, eval .*", capsys.readouterr().out)
    assert took is not None
    made = sorted(path.name for path in (folder / "out").iterdir())
    after = planned()
    assert states(after) == {"read": "to do", "score": "there", "expand": "there", "tune": "there", "eval": "there"}
    record = json.loads((folder / "out" / "expanded" / "adept_config.json").read_text())
    assert after["layers"] == [entry["copied_from"] for entry in record["inserted"]] and after["written"] == 0
    counted = before["counted"]
    assert counted["weights"] == 4 * record["parameters"]["total"] and counted["gradients"] == 4 * record["parameters"]["trainable"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == made
    assert states(planned("eval.max_items=5"))["eval"] == "to do"


@pytest.mark.slow
def test_other_settings_than_those_of_an_artefact_are_refused_as_a_run_refuses_them(
    folder: Path, planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model_name_or_path={folder / 'model'}", f"output_dir={tmp_path / 'out'}", *TINY, *MORE]
    assert main(["score", *given]) == 0
    capsys.readouterr()
    assert main(["plan", *given, f"domain={folder / 'notes.txt'}", "score.max_items=11"]) == 2
    assert "scores.json was made with other settings (score.max_items: 12, now 11)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["method=full"], {"score": "not needed", "expand": "not needed"}),
        (["method=lora", "tune.lora_rank=2"], {"score": "not needed", "expand": "not needed"}),
        (["method=uniform"], {"score": "not needed", "expand": "to do"}),
        (["tune.streaming=true"], {"score": "to do", "tune": "to do"}),
        (["score.method=gate", "score.compare=[fisher]", "score.units=tensor"], {"score": "to do"}),
        (["expand.k=1", "expand.budget={parameters: 0.4}", "score.domain_items=4"], {"score": "to do"}),
    ],
)
def test_other_methods_and_streams(planned, settings: list[str], expected: dict[str, str], tmp_path: Path) -> None:
    found = planned(*settings, f"output_dir={tmp_path / 'out'}")
    assert expected.items() <= states(found).items()
    assert found["seconds"] > 0 and found["counted"]["total"] > 0


@pytest.mark.slow
def test_a_model_that_leaks_across_documents_is_planned_with_one_a_row(planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adept_fast.pipeline.planning.estimates.isolates_documents", lambda *_: False)
    found = planned(f"output_dir={tmp_path / 'out'}", "method=uniform", "tune.max_steps=800")
    assert found["training"]["one_per_row"] and found["training"]["epochs"] > 4
    assert [warning for warning in found["warnings"] if "epochs over the same text" in warning]


@pytest.mark.slow
def test_without_a_domain_scoring_and_expansion_are_planned(planned, tmp_path: Path) -> None:
    found = planned(f"output_dir={tmp_path / 'out'}", domain=False)
    assert states(found) == {"read": "to do", "score": "to do", "expand": "to do", "tune": "not needed", "eval": "not needed"}
    assert found["training"] is None and found["suggestions"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [("expand.k=9", "expand.k must be"), ("model_name_or_path=nobody/nothing", "neither a folder nor a model on the hub")],
)
def test_what_cannot_run_is_an_error_in_one_line(
    folder: Path, setting: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={folder / 'none'}"]
    assert main(["plan", *given, setting]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (folder / "none").exists()


def test_a_step_keeps_what_the_shapes_say() -> None:
    model = expand_model(tiny_models.model(num_hidden_layers=6, dtype=torch.bfloat16), [2, 4])
    freeze_original(model)
    ids = torch.arange(64) % 200
    block = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64)}
    with fast_step(model):
        found = time_steps(model, TuningSettings(), [block], 2, 32)
    config = model.config
    least = 3 * kept_by_layer(config, False, torch.bfloat16) + 2 * kept_by_layer(config, True, torch.bfloat16)
    assert found.work == 64 and found.seconds > 0
    assert least <= found.kept <= 1.2 * least + 4 * tiny_models.VOCABULARY  # beside the layers the final norm and the head's gradient


@pytest.mark.parametrize(("dtype", "states"), [(torch.float32, 8), (torch.bfloat16, 10), (torch.float16, 12)])
def test_memory_of_training(dtype: torch.dtype, states: int) -> None:
    found = training_memory(100, 10, dtype, 7.0)
    assert (found.weights, found.gradients, found.states, found.activations) == (100 * dtype.itemsize, 10 * dtype.itemsize, 10 * states, 7)


def test_masking_is_timed_in_the_flops_of_what_ran() -> None:
    masks, items = LayerMasks(tiny_models.model(), SweepPlan(256, 64)), tiny_models.items(6)
    packs = pack(items, range(6), 64)
    every = range(masks.count)
    largest = max(masks.flops(each, every) for each in packs)
    assert time_masking(masks, packs, ("answer",), 1e3).work == largest
    assert time_masking(masks, packs, ("answer",), 0.0).work < largest


def test_padded_tokens_are_those_that_evaluation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items, seen = tiny_models.model(), tiny_models.items(9), []
    monkeypatch.setattr("adept_fast.models.losses.BATCH_TOKENS", 90)
    corpus_loss(model, items[:1])  # which looks at the head
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    corpus_loss(model, items)
    assert sum(seen) == padded_tokens(items) and len(seen) > 1
    mean = sum(len(item.input_ids) for item in items) / 9
    assert all(abs(len(typical(items).input_ids) - mean) <= abs(len(item.input_ids) - mean) for item in items)


@pytest.mark.parametrize(("steps", "every", "expected"), [(60, 20, 2), (61, 20, 3), (7, 500, 0), (0, 5, 0)])
def test_readings_before_the_last_step(steps: int, every: int, expected: int) -> None:
    assert _readings(steps, every) == expected == sum(step % every == 0 for step in range(1, steps))


def facts(**changes: object) -> Facts:
    usual = {
        "method": "adept", "layers": 30, "width": 576, "k": 4, "copies": True, "lengths": np.full(500, 300), "blocks": 800.0,
        "block_size": 1024, "positions": 8192, "batch": 4, "accumulation": 1, "learning_rate": 2e-3, "steps": 200, "by_steps": False,
        "epochs": 1.0, "refresh_steps": 25, "fixed": 1e9, "kept": 1e5, "capacity": 10**10, "checkpointing": False,
    }  # fmt: skip
    return Facts(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"k": 12}, ["expand.k=4"]),
        ({"k": None, "layers": 4}, []),
        ({"learning_rate": 2e-4}, ["tune.learning_rate=0.002"]),
        ({"width": 2304}, ["tune.learning_rate=0.0005"]),
        ({"copies": False, "k": None, "method": "full"}, ["tune.learning_rate=0.0001"]),
        ({"copies": False, "k": None, "method": "lora"}, []),
        ({"lengths": np.full(500, 3000)}, ["tune.block_size=4096", "tune.per_device_train_batch_size=2"]),
        ({"blocks": 200.0, "steps": 50, "refresh_steps": 10}, ["tune.per_device_train_batch_size=2"]),
        ({"capacity": 1.4e9}, ["tune.per_device_train_batch_size=2", "tune.gradient_accumulation_steps=2"]),
        (
            {"capacity": 1.15e9},
            ["tune.gradient_checkpointing=true", "tune.per_device_train_batch_size=1", "tune.gradient_accumulation_steps=4"],
        ),
        ({"epochs": 9.0, "steps": 1800}, ["tune.num_train_epochs=4"]),
        ({"epochs": 9.0, "steps": 1800, "by_steps": True}, ["tune.max_steps=800"]),
        ({"epochs": 0.5, "steps": 100, "by_steps": True}, ["tune.max_steps=200"]),
        ({"refresh_steps": 500}, ["tune.refresh_steps=25"]),
        ({"epochs": None, "blocks": 0.0, "lengths": None, "by_steps": True}, []),
    ],
)
def test_suggestions(changes: dict, expected: list[str]) -> None:
    found = suggest(facts(**changes))
    assert [str(suggestion) for suggestion in found] == expected
    assert all(len(suggestion.reason) > 20 for suggestion in found)


def test_times_and_sizes_as_text() -> None:
    assert [clock(seconds) for seconds in (None, 0.2, 65, 7265)] == ["?", "0:01", "1:05", "2:01:05"]
    assert [shown(size) for size in (None, 10**6, 2.5e9)] == ["?", "1.0 MB", "2.50 GB"]


def test_peak_memory_begins_anew() -> None:
    held = torch.ones(2**24)
    first = peak()
    del held
    forget_peak()
    assert resident() <= peak() <= first <= capacity()
