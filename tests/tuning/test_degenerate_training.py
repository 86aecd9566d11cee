"""Training where some batches have no target: no step of the fast way differs from transformers' own, on one process or two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainingArguments

from adept_fast.data.items import IGNORE
from adept_fast.expansion.expand_model import expand_model
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.stream_position import IN_ORDER
from tests.support import tiny_models
from tests.support.sharded_worker import in_processes
from tests.support.training_worker import as_launched

LENGTH = 12


def rows(supervised: str) -> list[dict[str, Tensor]]:
    """A row a letter: "-" none of it is a target, "x" all, "1" the first token alone, which nothing predicts."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (len(supervised), LENGTH), generator=torch.Generator().manual_seed(4))
    none = torch.full((LENGTH,), IGNORE)
    first = torch.arange(LENGTH) == 0
    kinds = {"-": lambda row: none, "x": lambda row: row, "1": lambda row: torch.where(first, row, IGNORE)}
    return [{"input_ids": row, "labels": kinds[kind](row)} for row, kind in zip(ids, supervised, strict=True)]


def trained(folder: Path, supervised: str, fast: bool, **changes: object) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The copies after a run over these rows in order, and the loss and gradient norm of each step as they were."""
    model = expand_model(tiny_models.model(num_hidden_layers=2), [0])
    args = TrainingArguments(
        output_dir=str(folder / f"fast-{fast}"), num_train_epochs=1, learning_rate=5e-3, weight_decay=0.1, logging_steps=1,
        logging_nan_inf_filter=not fast, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        **{"per_device_train_batch_size": 1, **IN_ORDER, **changes},
    )  # fmt: skip
    trainer = AdeptTrainer(model, args, adept=AdeptCallback(tiny_models.items(2)), train_dataset=rows(supervised))
    trainer.train() if fast else StagedTrainer.train(trainer)
    copies = {name: parameter.detach().clone() for name, parameter in trainer._trained().items()}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return copies, [entry["loss"] for entry in log], [float(entry["grad_norm"]) for entry in log]


def compare(folder: Path, supervised: str, empty: tuple[int, ...], **changes: object) -> None:
    """empty: the steps without a target."""
    ours, losses, norms = trained(folder, supervised, True, **changes)
    theirs, their_losses, their_norms = trained(folder, supervised, False, **changes)
    assert [step for step, norm in enumerate(norms) if norm == 0] == [*empty] and len(losses) > len(empty)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if step in empty:
            assert loss == 0 and norm == 0 and their_norms[step] == 0
        else:
            assert loss > 1 and abs(loss - their_losses[step]) <= 1e-5 * loss and abs(norm - their_norms[step]) <= 1e-4 * norm
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    if dist.is_initialized():  # what DDP keeps alike is alike
        for name, tensor in ours.items():
            other = tensor.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("supervised", "empty", "changes"),
    [
        ("-xx1", (0, 3), {}),
        ("--xx", (0,), {"per_device_train_batch_size": 2}),
        ("-xx1--xx", (2,), {"gradient_accumulation_steps": 2}),
        ("-x--", (1,), {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("x--x", (1, 2), {"bf16": True}),
    ],
    ids=["a batch", "two rows a batch", "a micro-batch", "checkpointed", "autocast"],
)
def test_steps_without_a_target(tmp_path: Path, supervised: str, empty: tuple[int, ...], changes: dict[str, object]) -> None:
    if changes.get("bf16"):
        ours, losses, norms = trained(tmp_path, supervised, True, **changes)
        assert [losses[step] for step in empty] == [norms[step] for step in empty] == [0.0] * len(empty)
        assert all(bool(tensor.isfinite().all()) for tensor in ours.values())
    else:
        compare(tmp_path, supervised, empty, **changes)


def on_two(folder: Path) -> None:
    as_launched()
    for average in (True, False):
        compare(folder / f"{average}-{os.environ['RANK']}", "-x--1xxx", (1,), average_tokens_across_devices=average)


def test_a_process_without_a_target(tmp_path: Path) -> None:
    """Rows go to the processes in turn: one has none while the other has, both have none, one has the first alone, both have some."""
    in_processes(2, tmp_path, on_two, tmp_path)


@pytest.mark.slow
def test_label_smoothing_without_a_target(tmp_path: Path) -> None:
    _, losses, norms = trained(tmp_path, "-xx-", True, label_smoothing_factor=0.1)
    assert [loss == 0 for loss in losses] == [norm == 0 for norm in norms] == [True, False, False, True]
