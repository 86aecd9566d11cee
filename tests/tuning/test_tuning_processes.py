"""AdeptTrainer on several processes: DDP and FSDP2 give the losses, rates and weights of one process, checkpoints go between them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.tuning import sharded_checkpoint
from adept_fast.tuning.adept_trainer import AdeptTrainer
from tests.support import tiny_models
from tests.support.sharded_worker import in_processes
from tests.support.training_worker import (
    GLOBAL_BATCH,
    check,
    equals_one_process,
    refresh_changes_nothing,
    resumes,
    streamed,
    streams,
    trained,
)

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs and weights of one process."""
    folder = tmp_path_factory.mktemp("processes")
    for units in GRANULARITIES:
        trainer, _ = trained(folder / f"alone-{units}", AdeptTrainer, units)
        torch.save(sharded_checkpoint.gathered(trainer.model), folder / f"alone-{units}" / "copies.pt")
    entries = [json.loads(line) for line in (folder / "alone-head" / "log.jsonl").read_text().splitlines()]
    assert sum("anchor_kl" in entry for entry in entries) == 3 and sum("meter_predicted" in entry for entry in entries) == 5
    assert 0 < min(entry.get("meter_rate_scale", 1) for entry in entries) < 1
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


@pytest.mark.nightly
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


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_two_processes_resumes_at_four(engine: str, on_two: Callable[[str], Path], tmp_path: Path) -> None:
    saved = on_two(engine) / f"{engine}-2-head"
    in_processes(4, tmp_path, resumes, copied(saved.parent, saved.name, tmp_path), engine, saved, "head")


def test_a_refresh_changes_nothing_but_the_rates_under_fsdp2(tmp_path: Path) -> None:
    in_processes(2, tmp_path, refresh_changes_nothing, tmp_path)


def blocks_of(folder: Path, processes: int, accumulation: int = 1) -> list[list[int]]:
    """What all processes saw, in the order of steps, batches and processes."""
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    assert {len(batch) for batches in seen for batch in batches} == {GLOBAL_BATCH // processes // accumulation}
    return [row for batches in zip(*seen, strict=True) for batch in batches for row in batch]


def test_a_stream_has_one_order_on_any_number_of_processes(tmp_path: Path) -> None:
    """Two processes see what one sees, and each number goes on from a checkpoint of the other's."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text * (1 + number % 3)}) + "\n" for number, text in enumerate(tiny_models.SENTENCES)))
    trainer, _ = streamed(tmp_path / "alone", corpus)
    torch.save(sharded_checkpoint.gathered(trainer.model), tmp_path / "alone" / "copies.pt")
    whole = blocks_of(tmp_path / "alone", 1)
    assert len({tuple(block) for block in whole}) > 70 and len(whole) == 20 * GLOBAL_BATCH
    shutil.copytree(tmp_path / "alone", tmp_path / "resumed")
    in_processes(2, tmp_path, streams, tmp_path, corpus)
    assert blocks_of(tmp_path / "whole", 2, accumulation=2) == whole
    assert blocks_of(tmp_path / "resumed", 2) == whole[10 * GLOBAL_BATCH :]
    again = copied(tmp_path, "whole", tmp_path / "again")
    trainer, log = streamed(again, corpus, str(tmp_path / "whole" / "work" / "checkpoint-10"))
    check(trainer, log, tmp_path / "alone")
    assert blocks_of(again, 1) == whole[10 * GLOBAL_BATCH :]
