"""What the processes of test_tuning_processes.py run: AdeptTrainer alone, under DDP and under FSDP2, on one global batch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from adept_fast.data.documents import Documents
from adept_fast.data.packing import Blocks
from adept_fast.expansion import expand_model
from adept_fast.tuning import AdeptCallback, AdeptTrainer, sharded
from adept_fast.tuning.log import TrainerLog
from adept_fast.units import GRANULARITIES, Units

GLOBAL_BATCH = 4


class Fsdp2Trainer(AdeptTrainer):
    """accelerate's own way through FSDP2 (optimizer built, model sharded, parameters swapped), which it offers to GPUs only."""

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
        )
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True


def blocks() -> Blocks:
    ids = np.random.default_rng(1).integers(3, tiny_models.VOCABULARY, 900).astype(np.int32)
    return Blocks(Documents(ids, np.array([0, 20, 90, 100, 250, 600, 900])), np.arange(6), 24)


def trained(
    folder: Path,
    engine: type[AdeptTrainer],
    units: str,
    resume: str | None = None,
    adept: dict[str, Any] | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> tuple[AdeptTrainer, list[dict]]:
    """The trainer after its run, and the log's lines (on rank 0)."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = expand_model(tiny_models.model("llama", num_hidden_layers=3, dtype=dtype, attention_dropout=dropout), [0, 1])
    log = TrainerLog(folder / "log.jsonl")
    options = {"refresh_steps": 4, "monitors": {"general": tiny_models.items(3, seed=9)}, **(adept or {})}
    callback = AdeptCallback(tiny_models.items(5), units, log=log, quiet=True, **options)
    given = {
        "max_steps": 20,
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-6,
        "logging_steps": 1,
        "save_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    trainer = engine(model, TrainingArguments(output_dir=str(folder / "work"), **given), adept=callback, train_dataset=blocks())
    for other in callbacks:
        trainer.add_callback(other)
    trainer.train(resume_from_checkpoint=resume)
    if dist.is_initialized():
        dist.barrier()
    return trainer, [json.loads(line) for line in log.path.read_text().splitlines()]


def as_launched() -> None:
    """What accelerate's launcher tells each process."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_USE_CPU": "true",
    }


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """Losses, rates and monitors of every step, to 1e-5."""
    assert [(entry["event"], entry["step"]) for entry in found] == [(entry["event"], entry["step"]) for entry in expected]
    for ours, wanted in zip(found, expected, strict=True):
        for key in ("loss", "general_loss", "learning_rate"):
            if key in wanted:
                assert abs(ours[key] - wanted[key]) <= 1e-5 * max(1, abs(wanted[key])), (wanted["event"], wanted["step"], key, ours, wanted)
        for unit, rate in wanted.get("rates", {}).items():
            assert abs(ours["rates"][unit] - rate) <= 1e-5, (wanted["step"], unit, ours["rates"][unit], rate)


ENGINES = {"ddp": AdeptTrainer, "fsdp2": Fsdp2Trainer}


def check(trainer: AdeptTrainer, log: list[dict], alone: Path) -> None:
    """Logs to 1e-5; weights to 1e-4, that is 2 % of one step of 5e-3: Adam divides rounding errors by small gradients."""
    assert_close(log, [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()])
    copies = sharded.gathered(trainer.model)
    for name, value in torch.load(alone / "copies.pt", weights_only=True).items():
        torch.testing.assert_close(copies[name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def equals_one_process(folder: Path, engine: str) -> None:
    as_launched()
    for units in GRANULARITIES:
        trainer, log = trained(folder / f"{engine}-{dist.get_world_size()}-{units}", ENGINES[engine], units)
        assert sharded.shards(trainer.model) == (engine == "fsdp2")
        check(trainer, log, folder / f"alone-{units}")


def resumes(folder: Path, engine: str, saved: Path, units: str) -> None:
    as_launched()
    trainer, log = trained(folder, ENGINES[engine], units, resume=str(saved / "work" / "checkpoint-10"))
    check(trainer, log, saved.parent / f"alone-{units}")


def ones(values: Tensor, units: Units) -> Tensor:
    return torch.ones_like(values)


def refresh_changes_nothing(folder: Path) -> None:
    """FSDP2, dropout, accumulation and checkpointing: weights with a refresh every step are those without, bit for bit."""
    as_launched()
    found = []
    for steps in (1, 100):
        trainer, log = trained(
            folder / str(steps),
            Fsdp2Trainer,
            "neuron",
            adept={"rate_map": ones, "refresh_steps": steps},
            dropout=0.1,
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
        )
        assert [entry["event"] for entry in log].count("refresh") == (4 if steps == 1 else 1)
        found.append(sharded.gathered(trainer.model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
