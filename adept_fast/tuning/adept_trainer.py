"""AdeptTrainer: a transformers Trainer that trains copies only, with unit-wise rates and checkpoints of what changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments

from adept_fast.checkpoints.adept_config import record_of
from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import freeze_original
from adept_fast.models.unwrap import bare, unwrapped
from adept_fast.settings.validation import require_made
from adept_fast.tuning import sharded_checkpoint
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.unit_rates import apply_rates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdeptTrainer(StagedTrainer):
    """A transformers Trainer for an expanded model, with the optimizer, the callback and the checkpoints in place.

    It freezes all but the copies, computes the loss without logits where it can (`fast_step`) and steps with AdamW. Its checkpoints are
    staged; they hold the copies, the optimizer state with the unit rates, and the record.

    Args:
        model: an expanded model, not wrapped.
        args: TrainingArguments.
        adept: the AdeptCallback that sets the unit rates.
        kwargs: further arguments of transformers.Trainer (train_dataset, data_collator, ...), and `extend=True` to resume with another
            number of steps where the schedule would have given the finished steps other learning rates.

    Raises:
        InputError: the model has no copies or is wrapped, or an argument cannot work here.

    >>> from transformers import TrainingArguments
    >>> args = TrainingArguments("out", per_device_train_batch_size=1, max_steps=2, learning_rate=1e-3, report_to="none")
    >>> data = [{"input_ids": item.input_ids, "labels": item.input_ids} for item in probe]
    >>> trainer = AdeptTrainer(expand_model(model, [1]), args, adept=AdeptCallback(probe), train_dataset=data)
    >>> trainer.train().global_step
    {'train_runtime': ...}
    2
    """

    trains_only_copies = True

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *, adept: AdeptCallback, **kwargs: Any) -> None:
        if unwrapped(model) is not model:
            raise InputError("model: the Trainer wraps it itself: pass the model inside, and torch_compile=True in args to compile it")
        require_made("args", args, TrainingArguments, "transformers.TrainingArguments(output_dir=...)")
        require_made("adept", adept, AdeptCallback, "AdeptCallback(probe)")
        freeze_original(model)
        self._adept = adept
        adept.restored_by_trainer = True
        super().__init__(model, args, **kwargs)
        self.add_callback(adept)
        adept.on_init_end(args, self.state, self.control, model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer.train does. `resume_from_checkpoint=True` resumes from the last checkpoint in output_dir.

        Raises InputError for a missing checkpoint, or one that was made with other settings.
        """
        with fast_step(self.model):
            return super().train(*args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._adept.made_with(bare(self.model), self._adept.tokenizer or self.processing_class)}

    def _load_best_model(self) -> None:
        StagedTrainer._load_from_checkpoint(self, str(self.state.best_model_checkpoint))

    def _save_trained(self, folder: Path) -> None:
        super()._save_trained(folder)
        record_of(bare(self.model)).save(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._adept.meter:
            self._adept.meter.save(Path(output_dir), bare(self.model))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / sharded_checkpoint.FOLDER).is_dir():  # dcp loads rates into existing tensors
            apply_rates(self.stepped, bare(self.model), self._adept.units, torch.ones(len(self._adept.units)))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._adept.resumed_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
