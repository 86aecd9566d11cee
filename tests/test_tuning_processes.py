"""AdeptTrainer on several processes: DDP and FSDP2 give the losses, rates and weights of one process, checkpoints go between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from sharded_worker import in_processes
from training_worker import check, equals_one_process, refresh_changes_nothing, resumes, trained

from adept_fast.tuning import AdeptTrainer, sharded
from adept_fast.units import GRANULARITIES

ENGINES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs and weights of one process."""
    folder = tmp_path_factory.mktemp("processes")
    for units in GRANULARITIES:
        trainer, _ = trained(folder / f"alone-{units}", AdeptTrainer, units)
        torch.save(sharded.gathered(trainer.model), folder / f"alone-{units}" / "copies.pt")
    return folder


@pytest.fixture(scope="module")
def on_two(alone: Path) -> Callable[[str], Path]:
    """engine -> the folder, after 2 processes have trained there."""

    @cache
    def run(engine: str) -> Path:
        in_processes(2, alone, equals_one_process, alone, engine)
        return alone

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine: str, on_two: Callable[[str], Path]) -> None:
    on_two(engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_equal_one(engine: str, alone: Path) -> None:
    in_processes(4, alone, equals_one_process, alone, engine)


def copied(folder: Path, name: str, target: Path) -> Path:
    """A run's folder to go on from, beside the one that is kept."""
    return shutil.copytree(folder / name, target / name)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_processes_resumes_at_one(engine: str, on_two: Callable[[str], Path], tmp_path: Path) -> None:
    saved = on_two(engine) / f"{engine}-2-neuron"
    again = copied(saved.parent, saved.name, tmp_path)
    trainer, log = trained(again, AdeptTrainer, "neuron", resume=str(saved / "work" / "checkpoint-10"))
    check(trainer, log, saved.parent / "alone-neuron")
    names = {file.name for file in (saved / "work" / "checkpoint-10").iterdir()}
    assert names >= {"adept_config.json", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}
    assert ("sharded" in names) == (engine == "fsdp2") != ("adept_copies.safetensors" in names)
    assert {file.name for file in (saved / "work").iterdir()} == {"checkpoint-10", "checkpoint-20"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_processes_resumes_at_four(engine: str, on_two: Callable[[str], Path], tmp_path: Path) -> None:
    saved = on_two(engine) / f"{engine}-2-head"
    in_processes(4, tmp_path, resumes, copied(saved.parent, saved.name, tmp_path), engine, saved, "head")


def test_a_refresh_changes_nothing_but_the_rates_under_fsdp2(tmp_path: Path) -> None:
    in_processes(2, tmp_path, refresh_changes_nothing, tmp_path)
