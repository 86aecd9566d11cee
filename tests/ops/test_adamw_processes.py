"""`accelerate launch -m adept_fast tune` on two CPU processes writes what one process writes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from adept_fast.checkpoints.digest import fingerprint
from adept_fast.cli.main import main
from adept_fast.runtime import distributed
from tests.support import tiny_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a domain, and an output_dir that holds the expanded model."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_models.checkpoint(folder / "model", "qwen2")
    lines = [f"{sentence} It is note {number}." for number, sentence in enumerate(tiny_models.SENTENCES * 3)]
    (folder / "notes.txt").write_text("\n\n".join(lines))
    assert main(["expand", *settings(folder, "two")]) == 0
    shutil.copytree(folder / "two", folder / "one")
    return folder


def settings(folder: Path, output: str, batch: int = 4) -> list[str]:
    return [
        f"model_name_or_path={folder / 'model'}",
        f"domain={folder / 'notes.txt'}",
        f"output_dir={folder / output}",
        "expand.layers=[1,2]",
        "tune.units=head",
        "tune.max_steps=6",
        "tune.refresh_steps=2",
        f"tune.per_device_train_batch_size={batch}",
        "tune.block_size=64",
        "tune.max_items=5",
        "tune.adam_epsilon=1e-6",
    ]


@pytest.mark.nightly
def test_two_processes_tune_what_one_tunes(expanded: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port), "-m", "adept_fast", "tune"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, *settings(expanded, "two", batch=2)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    tuned = str(expanded / "two" / "tuned")
    told = [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith(("plan:", "step ", tuned))]
    assert told == ["plan", "step 0", "step 2", "step 4", "step 6", tuned], done.stdout
    assert main(["tune", *settings(expanded, "one")]) == 0
    logs = [[json.loads(line) for line in (expanded / name / "trainer_log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [(entry["event"], entry["step"]) for entry in logs[0]] == [(entry["event"], entry["step"]) for entry in logs[1]]
    for alone, both in zip(*logs, strict=True):
        for key in ("loss", "general_loss", "domain_loss", "learning_rate", "tokens"):
            assert both.get(key) == pytest.approx(alone.get(key), abs=1e-5), (alone, both)
        assert both.get("rates") == pytest.approx(alone.get("rates"), abs=1e-5) if "rates" in alone else "rates" not in both
    weights = [load_file(expanded / name / "tuned" / "model.safetensors") for name in ("one", "two")]
    base = load_file(expanded / "two" / "expanded" / "model.safetensors")
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-5)
    assert any(not torch.equal(weights[1][name], tensor) for name, tensor in base.items())
    assert not [path for path in (expanded / "two").rglob("*partial*")]


def test_stages_of_one_process_say_so(expanded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", *settings(expanded, "other")]) == 2
    assert "run runs in one process; score and tune take several" in capsys.readouterr().err


def test_new_tokens_are_refused(expanded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for place in ("model", "two"):
        shutil.copytree(expanded / place, tmp_path / place, ignore=shutil.ignore_patterns("tuned", "checkpoints"))
    for place in ("model", "two/expanded"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / place)
        assert tokenizer.add_tokens(["<gene>", "<protein>"]) == 2
        tokenizer.save_pretrained(tmp_path / place)
    rows, tokens = tiny_models.VOCABULARY, len(tokenizer)
    assert tokens == rows + 2
    for command, output in (("tune", "two"), ("run", "new")):
        record = tmp_path / output / "expanded" / "adept_config.json"
        if record.is_file():  # of the model with the new tokens
            found = json.loads(record.read_text())
            found["inputs"]["model"] = fingerprint(tmp_path / "model")
            record.write_text(json.dumps(found))
        assert main([command, *settings(tmp_path, output), f"domain={expanded / 'notes.txt'}"]) == 2
        error = capsys.readouterr().err
        assert f"its tokenizer has {tokens} tokens, its embeddings {rows}" in error and "embeddings are frozen" in error


def test_processes_that_transformers_does_not_see_are_refused(
    expanded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would train alone."""
    shutil.copytree(expanded / "two" / "expanded", expanded / "unseen" / "expanded")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    log = expanded / "unseen" / "trainer_log.jsonl"
    log.write_text("an earlier run's\n")
    assert main(["tune", *settings(expanded, "unseen")]) == 2
    assert "2 processes run, transformers sees 1: start them by accelerate launch" in capsys.readouterr().err
    assert log.read_text() == "an earlier run's\n" and not (expanded / "unseen" / "tuned").exists()
