"""AdeptTrainer: transformers' Trainer that trains copies only, with unit-wise rates and checkpoints of what changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from adept_fast.errors import InputError
from adept_fast.expansion import freeze_original
from adept_fast.record import record_of
from adept_fast.saliency import bare
from adept_fast.tuning import sharded
from adept_fast.tuning.callback import AdeptCallback, adamw
from adept_fast.tuning.groups import flattened
from adept_fast.tuning.rates import apply_rates
from adept_fast.tuning.staged import TRAINED, StagedTrainer
from adept_fast.tuning.step import fast_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdeptTrainer(StagedTrainer):
    """Trainer(model, args, ..., adept=AdeptCallback(...)) for an expanded model.

    Freezes all but the copies, takes the loss without logits (see fast_step), steps and keeps checkpoints as StagedTrainer does; these hold
    the record, the unit rates and, under FSDP2, each process's part too. Raises InputError for a model that was not expanded.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *, adept: AdeptCallback, **kwargs: Any) -> None:
        record_of(model)
        freeze_original(model)
        self._adept = adept
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1):
            raise flattened("DeepSpeed ZeRO" if self.is_deepspeed_enabled else "FSDP1")
        self.add_callback(adept)
        adept.on_init_end(args, self.state, self.control, model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with fast_step(self.model):
            return super().train(*args, **kwargs)

    def _save_trained(self, folder: Path) -> None:
        if not sharded.shards(self.model):
            super()._save_trained(folder)
        record_of(bare(self.model)).save(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._adept.meter:
            self._adept.meter.save(Path(output_dir), bare(self.model))
        if not sharded.shards(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save(self.model, adamw(self.optimizer), Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / sharded.FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = adamw(self.optimizer)
        apply_rates(optimizer, bare(self.model), self._adept.units, torch.ones(len(self._adept.units)))
        sharded.load_optimizer(self.model, optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._adept.resumed_from = resume_from_checkpoint
        if (folder / sharded.FOLDER).is_dir():
            sharded.load_copies(self.model, folder)
            return
        if (folder / TRAINED).is_file() and sharded.shards(self.model):
            raise InputError(f"{folder}: of a run that sharded nothing: resume it without FSDP, or delete it to start again")
        super()._load_from_checkpoint(resume_from_checkpoint, model)
