"""The whole run from the command line: with two settings only, and killed again and again, ending in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file

from adept_fast import checkpoint
from adept_fast.cli import main

KILLER = """
import importlib, os, signal, sys
place, calls = sys.argv[1], int(sys.argv[2])
if place != "nowhere":
    module, name = place.split(":")
    module = importlib.import_module(module)
    original = getattr(module, name)
    def counted(*args, **kwargs):
        global calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, counted)
from adept_fast.cli import main
sys.exit(main(sys.argv[3:]))
"""
PLACES = (
    ("adept_fast.importance.masking:measure", 3),  # scoring
    ("adept_fast.expansion.write:first_importance", 0),
    ("adept_fast.expansion.write:compare", 0),  # expanding, all written but the name
    ("adept_fast.tuning.trainer:save_file", 0),  # the first checkpoint
    ("adept_fast.tuning.callback:unit_rates", 2),  # a refresh
    ("adept_fast.tuning.trainer:save_file", 1),  # a later checkpoint
    ("adept_fast.checkpoint:differing_tensors", 0),  # the tuned model, all written but the name
    ("adept_fast.pipeline:evaluate", 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_models.checkpoint(folder / "model", "qwen2", attention_dropout=0.1)
    lines = [f"{sentence} It is note {number}.\n" for number, sentence in enumerate(tiny_models.SENTENCES * 5)]
    (folder / "notes.txt").write_text("".join(lines))
    assert len(lines) == 200
    return folder


def settings(folder: Path, output: str) -> list[str]:
    return [
        f"model_name_or_path={folder / 'model'}",
        f"domain={folder / 'notes.txt'}",
        f"output_dir={folder / output}",
        "expand.k=2",
        "tune.max_steps=7",
        "tune.refresh_steps=2",
        "tune.per_device_train_batch_size=2",
        "tune.block_size=64",
        "tune.weight_decay=0.1",
        "tune.max_items=6",
        "score.max_items=20",
        "seed=5",
    ]


def command(folder: Path, output: str, place: str, calls: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ADEPT_FAST_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", KILLER, place, str(calls), "run", *settings(folder, output)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def artefacts(folder: Path) -> dict[str, object]:
    """Everything a run leaves, without times."""
    scores = json.loads((folder / "scores.json").read_text())
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    evaluation = json.loads((folder / "eval.json").read_text())
    return {
        "scores": {key: value for key, value in scores.items() if key != "seconds"},
        "log": [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in log],
        "evaluation": {key: value for key, value in evaluation.items() if key != "seconds"},
        **{name: (folder / name).read_bytes() for name in ("expanded/model.safetensors", "tuned/model.safetensors")},
        "records": [json.loads((folder / name / "adept_config.json").read_text()) for name in ("expanded", "tuned")],
    }


def test_killed_at_every_stage_the_run_ends_in_the_same_bits(folder: Path) -> None:
    whole = command(folder, "whole", "nowhere", 0)
    assert whole.returncode == 0, whole.stderr
    resumptions = 0
    for place, calls in PLACES:
        killed = command(folder, "killed", place, calls)
        assert killed.returncode == -9, f"{place} was not reached: {killed.stderr}"
        resumptions += "resuming from checkpoint-" in killed.stdout
    resumed = command(folder, "killed", "nowhere", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert resumptions == 3 and "resuming" not in whole.stdout
    expected, found = artefacts(folder / "whole"), artefacts(folder / "killed")
    for name in expected:
        assert found[name] == expected[name], name
    assert not list((folder / "killed").rglob(".partial*")) and (folder / "killed" / "report.html").is_file()


def test_a_text_file_and_a_model_are_enough(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
    output = folder / "simple"
    arguments = ["run", f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={output}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "plan: " in said and "epochs over" in said and "every original tensor is bit-equal" in said
    assert {path.name for path in output.iterdir()} >= {
        "scores.json", "scores.png", "expanded", "tuned", "trainer_log.jsonl", "eval.json", "report.html",
    }  # fmt: skip
    result = json.loads((output / "eval.json").read_text())["models"]
    assert result["base"]["domain"]["items"] >= 1 and result["tuned"]["domain"]["loss"] != result["base"]["domain"]["loss"]
    base, tuned = load_file(folder / "model" / "model.safetensors"), load_file(output / "tuned" / "model.safetensors")
    record = json.loads((output / "tuned" / "adept_config.json").read_text())
    places = {entry["copied_from"]: entry["layer"] for entry in record["inserted"]}
    for name, tensor in base.items():
        parts = name.split(".")
        if parts[1] == "layers":
            index = int(parts[2])
            parts[2] = str(index + sum(source < index for source in places))
        assert tensor.equal(tuned[".".join(parts)]), name
    assert main(arguments) == 0 and capsys.readouterr().out.count("up to date") == 4
    assert main(["run", str(output / "recipe.yaml")]) == 0 and capsys.readouterr().out.count("up to date") == 4
    assert main(["verify", *arguments[1:]]) == 0 and main(["verify", *arguments[1:], "dtype=bfloat16"]) == 0
    assert checkpoint.load_model(output / "tuned").adept_config.copies
