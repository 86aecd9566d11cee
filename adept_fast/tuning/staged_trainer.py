"""A Trainer whose checkpoints are staged and hold what is trained: parameters, optimizer state, data position."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adept_fast.errors import InputError
from adept_fast.models.finite import require_finite_tensors
from adept_fast.optim import AdamW
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import discard
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.input_files import making_sense, regular
from adept_fast.settings.training_arguments import PLAIN_ADAMW
from adept_fast.tuning import checkpoint_digests, sharded_checkpoint
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.param_group_rates import refusal
from adept_fast.tuning.sampler import WholeSteps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED = "adept_copies.safetensors"
NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class StagedTrainer(Trainer):
    """Trainer(model, args, ...) for whatever parameters of a model require grad.

    Steps with adept_fast.AdamW (exact fp32 masters where the parameters are bf16 or fp16) and switches the cache off, as packed documents
    need it. Checkpoints are staged and renamed, by all processes together where they are several (a shared file system); under FSDP2 they
    hold each process's part. `save_model()` writes the whole model. Raises InputError for engines that flatten parameters.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        model.config.use_cache = False
        self._staging: Path | None = None
        self._written: list[Path] = []
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1):
            raise refusal("DeepSpeed ZeRO" if self.is_deepspeed_enabled else "FSDP1")

    @property
    def stepped(self) -> AdamW:
        """The optimizer itself, out of accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, dict[str, Any]]:
        optim = str(getattr(args.optim, "value", args.optim))
        if optim not in PLAIN_ADAMW:
            raise InputError(f"tune.optim={optim}: unit-wise rates need adept_fast.AdamW: leave optim at its default")
        trained = [] if model is None else [parameter for parameter in model.parameters() if parameter.requires_grad]
        dtypes = {parameter.dtype for parameter in trained}
        masters = "copy" if torch.float16 in dtypes else "remainder" if torch.bfloat16 in dtypes else None
        return AdamW, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            **({"master_weights": masters, "state_dtype": torch.float32} if masters else {}),
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not RandomSampler:
            return sampler
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return WholeSteps(sampler.data_source, per_step, args.seed if args.data_seed is None else args.data_seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self._require_finite(str(output_dir or self.args.output_dir))
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._save_trained(folder)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Monitor):
                callback.nonfinite.take(inputs, loss)
        return loss

    def _save_trained(self, folder: Path) -> None:
        self._require_finite(str(folder.name))
        if not in_shards(self.model):
            save_file({name: parameter.detach().contiguous() for name, parameter in self._trained().items()}, folder / TRAINED)

    def _require_finite(self, where: str) -> None:
        way_out = "training went wrong: go on from an earlier checkpoint, with a lower learning rate"
        require_finite_tensors(self._trained().items(), where, way_out)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not in_shards(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_checkpoint.save(self.model, self.stepped, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / sharded_checkpoint.FOLDER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded_checkpoint.load_optimizer(self.model, self.stepped, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        path = folder / TRAINED
        checkpoint_digests.verify(folder)
        if (folder / sharded_checkpoint.FOLDER).is_dir():
            sharded_checkpoint.load_trained(self.model, folder)
            self._require_finite(str(folder))
            return
        if not path.is_file():
            if os.path.lexists(path):
                regular(path)
            with making_sense(folder, "delete it to start again, or to go on from an earlier one"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if in_shards(self.model):
            raise InputError(f"{folder}: of a run that sharded nothing: resume it without FSDP, or delete it to start again")
        parameters = self._trained()
        with making_sense(path, "delete the checkpoint to start again"):
            saved = load_file(path)
        if set(saved) != set(parameters):
            raise InputError(f"{path}: holds other tensors than are trained: delete the checkpoint, or resume with the model it is from")
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
        self._require_finite(str(folder))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        leads = distributed.rank() == 0
        if final.exists() and leads:
            if not _is_own(final):
                raise InputError(f"{final}: not a checkpoint of copies: move it away, or train into another output_dir")
            discard(final)
        with distributed.staged_together(final) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            distributed.wait()
            if leads:
                written = staging / final.name
                for file in written.iterdir():
                    file.rename(staging / file.name)
                written.rmdir()
                checkpoint_digests.seal(staging)
        if leads:
            self._rotate(folder, final)

    def _rotate(self, folder: Path, newest: Path) -> None:
        """Delete all but the last `save_total_limit` checkpoints: first those that were there before, then this run's, each by their steps.
        What another program has made stays."""
        self._written.append(newest)
        there = [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name) and _is_own(path)]
        there.sort(key=lambda path: (path in self._written, int(path.name.rpartition("-")[2])))
        for old in there[: -(self.args.save_total_limit or len(there))]:
            discard(old)


def _is_own(path: Path) -> bool:
    return not path.is_symlink() and ((path / TRAINED).is_file() or (path / sharded_checkpoint.FOLDER).is_dir())
