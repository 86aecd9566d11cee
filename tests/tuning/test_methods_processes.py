"""Baselines on two processes: the losses and weights of one, under DDP and, where every parameter is trained, under FSDP2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adept_fast.pipeline.run import STAGES
from adept_fast.pipeline.run_directory import RunDirectory
from tests.support import tiny_models
from tests.support.sharded_worker import in_processes
from tests.support.training_worker import method_recipe, tune_by, tune_by_all

pytestmark = pytest.mark.slow

METHODS = ("full", "replay", "uniform", "lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method's outputs of one process, and of two as METHOD-ddp and full-fsdp2."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_models.checkpoint(folder / "model", tie_word_embeddings=True)
    (folder / "notes.txt").write_text("\n\n".join(f"{text} It is note {number}." for number, text in enumerate(tiny_models.SENTENCES * 2)))
    (folder / "general.txt").write_text("\n\n".join(f"General text {number} on {number * 3} matters." for number in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
        for output in ("uniform", "uniform-ddp"):
            recipe = method_recipe(folder, output, "uniform")
            STAGES["expand"](recipe, RunDirectory(recipe.folder))
        for method in METHODS:
            tune_by(folder, method, method)
    in_processes(2, folder, tune_by_all, folder, METHODS)
    return folder


def assert_same(found: Path, wanted: Path) -> None:
    logs = [[json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()] for output in (found, wanted)]
    assert [(entry["event"], entry["step"]) for entry in logs[0]] == [(entry["event"], entry["step"]) for entry in logs[1]]
    for ours, theirs in zip(*logs, strict=True):
        for key in {"loss", "general_loss", "domain_loss", "learning_rate", "tokens"} & theirs.keys():
            assert abs(ours[key] - theirs[key]) <= 1e-5 * max(1, abs(theirs[key])), (theirs["event"], theirs["step"], key)
    ours, theirs = (load_file(output / "tuned" / "model.safetensors") for output in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_trains(method: str, folder: Path) -> None:
    steps = [json.loads(line) for line in (folder / method / "trainer_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in steps if entry["event"] == "step"]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    assert_same(folder / f"{method}-ddp", folder / method)


def test_full_training_is_sharded(folder: Path) -> None:
    assert_same(folder / "full-fsdp2", folder / "full")
    names = {path.name for path in (folder / "full-fsdp2" / "checkpoints" / "checkpoint-4").iterdir()}
    assert "sharded" in names and "adept_copies.safetensors" not in names


def test_a_sharded_run_goes_on_at_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
    output = folder / "full-again"
    shutil.copytree(folder / "full-fsdp2", output)
    shutil.rmtree(output / "tuned")
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    tune_by(folder, "full-again", "full")
    assert_same(output, folder / "full")
