"""What the processes of test_tuning_processes.py run: AdeptTrainer alone, under DDP and under FSDP2, on one global batch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from adept_fast.data.documents import Documents
from adept_fast.data.packing import Blocks
from adept_fast.data.sources import Source
from adept_fast.data.stream import Stream
from adept_fast.data.streamed_text import StreamedText
from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model
from adept_fast.pipeline.recipe import Recipe, load
from adept_fast.pipeline.run import STAGES
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.runtime.dtensor import in_shards
from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.scoring.units import Units
from adept_fast.tuning import baselines, forgetting_meter, sharded_checkpoint
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.kl_anchor import Anchor
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.stream_position import IN_ORDER, StreamPosition
from adept_fast.tuning.trainer_log import TrainerLog
from tests.support import tiny_models

GLOBAL_BATCH = 4
METERED = 4


class Fsdp2:
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


class Fsdp2Trainer(Fsdp2, AdeptTrainer):
    pass


class Fsdp2Baseline(Fsdp2, StagedTrainer):
    pass


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
    data: Dataset | None = None,
    **changes: Any,
) -> tuple[AdeptTrainer, list[dict]]:
    """The trainer after its run, and the log's lines (on rank 0)."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = expand_model(tiny_models.model("llama", num_hidden_layers=3, dtype=dtype, attention_dropout=dropout), [0, 1])
    log = TrainerLog(folder / "log.jsonl")
    held = {
        "anchor": Anchor(tiny_models.items(4, seed=7), 0.5, every=6, tokens=40),
        "meter": Meter(tiny_models.items(METERED, seed=11), limit=0.02, action="cut"),
    }
    options = {
        "refresh_steps": 4,
        "monitors": {"general": tiny_models.items(3, seed=9)},
        **(held if units != "tensor" else {}),  # its runs are plain
        **(adept or {}),
    }
    callback = AdeptCallback(tiny_models.items(5), units, log=log, **options)
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
    trainer = engine(model, TrainingArguments(output_dir=str(folder / "work"), **given), adept=callback, train_dataset=data or blocks())
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
        "OMP_NUM_THREADS": "1",  # else accelerate gives each process all cores, whose threads wait for each other spinning
    }


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """Losses, rates, monitors, the anchor's KL and the meter's readings of every step, to 1e-5."""
    assert [(entry["event"], entry["step"]) for entry in found] == [(entry["event"], entry["step"]) for entry in expected]
    for ours, wanted in zip(found, expected, strict=True):
        where = wanted["event"], wanted["step"]
        assert ours.keys() == wanted.keys(), where
        for key in {"loss", "general_loss", "learning_rate", "anchor_kl", "meter_loss", "meter_rise", "meter_rate_scale"} & wanted.keys():
            assert abs(ours[key] - wanted[key]) <= 1e-5 * max(1, abs(wanted[key])), (*where, key, ours, wanted)
        for key in {"rates", "meter_predicted", "meter_bound"} & wanted.keys():
            for unit, value in wanted[key].items():
                assert abs(ours[key][unit] - value) <= 1e-5, (*where, key, unit, ours[key][unit], value)


class Recording(AdeptTrainer):
    """Keeps the token ids of every batch of this process."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def streamed(folder: Path, corpus: Path, resume: str | None = None, accumulation: int = 1) -> tuple[Recording, list[dict]]:
    """`trained` on a stream, GLOBAL_BATCH blocks a step; the blocks of each process go to folder/seen-RANK.json."""
    text = StreamedText((Source(str(corpus)), Source(str(corpus), share=0.3)), lambda document: True, "none", 7)
    mixture = [(0.7, 0.7), (0.3, 0.3)]
    stream = Stream(text, mixture, tiny_models.tokenizer(), blocks=20 * GLOBAL_BATCH, block_size=24, seed=5, ahead=4 * GLOBAL_BATCH)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trainer, log = trained(
        folder,
        Recording,
        "tensor",
        resume,
        callbacks=[StreamPosition(stream, GLOBAL_BATCH, resume)],
        data=stream,
        per_device_train_batch_size=GLOBAL_BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        **IN_ORDER,
    )
    (folder / f"seen-{rank}.json").write_text(json.dumps(trainer.seen))
    return trainer, log


def streams(folder: Path, corpus: Path) -> None:
    """On these processes: the whole run, and one that goes on from the checkpoint of one process."""
    as_launched()
    for name, resume, accumulation in (("whole", None, 2), ("resumed", str(folder / "alone" / "work" / "checkpoint-10"), 1)):
        trainer, log = streamed(folder / name, corpus, resume, accumulation)
        check(trainer, log, folder / "alone")


ENGINES = {"ddp": AdeptTrainer, "fsdp2": Fsdp2Trainer}


def check(trainer: AdeptTrainer, log: list[dict], alone: Path) -> None:
    """Logs to 1e-5; weights to 1e-4, that is 2 % of one step of 5e-3: Adam divides rounding errors by small gradients."""
    assert_close(log, [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()])
    copies = sharded_checkpoint.gathered(trainer.model)
    for name, value in torch.load(alone / "copies.pt", weights_only=True).items():
        torch.testing.assert_close(copies[name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def equals_one_process(folder: Path, engine: str) -> None:
    as_launched()
    run, metered = forgetting_meter.batch_loss, []
    forgetting_meter.batch_loss = lambda model, items: metered.append(items) or run(model, items)
    for units in GRANULARITIES:
        trainer, log = trained(folder / f"{engine}-{dist.get_world_size()}-{units}", ENGINES[engine], units)
        assert in_shards(trainer.model) == (engine == "fsdp2")
        check(trainer, log, folder / f"alone-{units}")
    readings = 2 * 6  # of the runs by head and by neuron
    assert len(metered) == readings * METERED // (1 if engine == "fsdp2" else dist.get_world_size())


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
            adept={"rate_map": ones, "refresh_steps": steps, "meter": Meter(tiny_models.items(1, seed=11))},
            dropout=0.1,
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
        )
        assert [entry["event"] for entry in log].count("refresh") == (4 if steps == 1 else 1)
        found.append(sharded_checkpoint.gathered(trainer.model))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def method_recipe(folder: Path, output: str, method: str) -> Recipe:
    world = dist.get_world_size() if dist.is_initialized() else 1
    replay = [f"tune.replay={{path: {folder / 'general.txt'}, share: 0.4}}"] if method == "replay" else []
    return load(
        None,
        [
            f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={folder / output}", f"method={method}",
            "expand.k=2", "tune.max_steps=6", "tune.refresh_steps=2", "tune.block_size=48", "tune.max_items=4", "tune.lora_rank=4",
            f"tune.per_device_train_batch_size={GLOBAL_BATCH // world}", "tune.learning_rate=0.005", "tune.weight_decay=0.1",
            "tune.adam_epsilon=1e-6", "tune.save_total_limit=5", "tune.use_cpu=true", "seed=3", *replay,
        ],
    )  # fmt: skip


def tune_by(folder: Path, output: str, method: str) -> None:
    recipe = method_recipe(folder, output, method)
    STAGES["tune"](recipe, RunDirectory(recipe.folder))


def tune_by_all(folder: Path, methods: Sequence[str]) -> None:
    """Each method under DDP, full training under FSDP2 too, which LoRA refuses."""
    as_launched()
    for method in methods:
        tune_by(folder, f"{method}-ddp", method)
    baselines.StagedTrainer = Fsdp2Baseline
    tune_by(folder, "full-fsdp2", "full")
    try:
        tune_by(folder, "lora-fsdp2", "lora")
    except InputError as error:
        assert str(error).startswith("method=lora: not under FSDP")
    else:
        raise AssertionError("LoRA ran under FSDP2")
