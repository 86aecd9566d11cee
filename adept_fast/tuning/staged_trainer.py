"""A Trainer whose checkpoints are staged, and hold only what training changes: parameters, optimizer state, data position."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from adept_fast.data.items import IGNORE
from adept_fast.errors import InputError
from adept_fast.models.finite import require_finite_tensors
from adept_fast.optim import AdamW
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import discard
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.input_files import as_input_error, regular
from adept_fast.settings.training_arguments import refuse
from adept_fast.tuning import checkpoint_digests, sharded_checkpoint
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.param_group_rates import flattening_error
from adept_fast.tuning.resuming_trainer import ResumingTrainer
from adept_fast.tuning.sampler import EpochSampler, GlobalBatchSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED = "adept_copies.safetensors"
NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class StagedTrainer(ResumingTrainer):
    """A Trainer for the parameters of a model that require grad.

    It steps with adept_fast.AdamW, with exact fp32 masters for bf16 and fp16 parameters. Checkpoints are staged and renamed, by all
    processes together on a shared file system; under FSDP2 each process writes its shards. `save_model()` writes the whole model.
    `extend` is that of ResumingTrainer. Raises InputError for arguments that cannot work here, and for engines that flatten
    parameters.
    """

    trains_only_copies = False  # whether it trains nothing but copies

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        refuse(args, self.trains_only_copies)
        self._staging: Path | None = None
        self._written: list[Path] = []
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1):
            raise flattening_error("DeepSpeed ZeRO" if self.is_deepspeed_enabled else "FSDP1")

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, dict[str, Any]]:
        trained = [] if model is None else [parameter for parameter in model.parameters() if parameter.requires_grad]
        dtypes = {parameter.dtype for parameter in trained}
        masters = "copy" if torch.float16 in dtypes else "remainder" if torch.bfloat16 in dtypes else None
        return AdamW, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            **({"master_weights": masters, "state_dtype": torch.float32} if masters else {}),
        }

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        sampler, args = super()._get_train_sampler(train_dataset), self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if type(sampler) is LengthGroupedSampler:
            return EpochSampler(sampler, seed)
        if type(sampler) is not RandomSampler:
            return sampler
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return GlobalBatchSampler(sampler.data_source, per_step, seed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call or output_dir is None:  # called by the user, or by push_to_hub()
            self._require_finite(str(output_dir or self.args.output_dir))
            with self._users_config():
                super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._save_trained(folder)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the Trainer's loss, but 0 for a training batch without targets, where models and label smoothing divide 0 by 0."""
        labels = inputs.get("labels")
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if not (isinstance(found, torch.Tensor) and isinstance(labels, torch.Tensor) and model.training) or self.compute_loss_func:
            return found
        return torch.where((labels[..., 1:] != IGNORE).any().to(found.device), found, 0)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Monitor):
                callback.nonfinite.add_batch(inputs, loss)
        return loss

    def _track(self, values: dict[str, float]) -> None:
        """Send values to the trackers of report_to. They do not enter the log history, which checkpoints store."""
        trackers: tuple[type[TrainerCallback], ...] = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if values and isinstance(callback, trackers):
                callback.on_log(self.args, self.state, self.control, logs=dict(values), model=self.model)

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
            assert self.lr_scheduler is not None  # made before the first step
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / sharded_checkpoint.FOLDER).is_dir():
            if checkpoint is not None and not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
                raise InputError(f"{checkpoint}: holds no {OPTIMIZER_NAME} (save_only_model?): a run cannot go on from it")
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            sharded_checkpoint.load_optimizer(self.model, self.stepped, Path(checkpoint))
            assert self.lr_scheduler is not None  # made before it is loaded
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if checkpoint is not None and self.run.extended and isinstance(self.lr_scheduler, LambdaLR):
            self._take_the_new_rate(self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
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
            with as_input_error(folder, "delete it to start again, or to go on from an earlier one"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if in_shards(self.model):
            raise InputError(f"{folder}: of a run that sharded nothing: resume it without FSDP, or delete it to start again")
        parameters = self._trained()
        with as_input_error(path, "delete the checkpoint to start again"):
            saved = load_file(path)
        if set(saved) != set(parameters):
            raise InputError(f"{path}: holds other tensors than are trained: delete the checkpoint, or resume with the model it is from")
        for name, tensor in saved.items():
            if tensor.shape != parameters[name].shape:
                found = f"{name} is {tuple(tensor.shape)} there, {tuple(parameters[name].shape)} in the model"
                raise InputError(f"{path}: {found}: resume with the model it is from, or delete the checkpoint")
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
        self._require_finite(str(folder))

    def _load_best_model(self) -> None:
        """Load the trained parameters of the best checkpoint; the other parameters never changed."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        leads = distributed.rank() == 0
        if final.exists() and leads and not _is_own(final):
            raise InputError(f"{final}: not a checkpoint of copies: move it away, or train into another output_dir")
        with distributed.staged_together(final) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
                written = staging / final.name
                self._write_state(written, folder)
            finally:
                self._staging = None
            distributed.barrier()
            if leads:
                for file in written.iterdir():
                    file.rename(staging / file.name)
                written.rmdir()
                checkpoint_digests.write(staging)
        if leads:
            self.rotate(folder, final)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Monitor):
                callback.track = self._track
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        newest = get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint and distributed.rank() == 0 else None
        if newest is not None:  # a run that was killed before it rotated has left a checkpoint too many
            self.rotate(Path(newest).parent, Path(newest))
        return result

    def _write_state(self, written: Path, folder: Path) -> None:
        """Write the run's record, and the trainer state with the final path of the best checkpoint, which is staged when it is saved."""
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.name == written.name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.run.save(written)

    def rotate(self, folder: Path, newest: Path) -> None:
        """Delete all but the last `save_total_limit` checkpoints, those of earlier runs first, then by step.

        The newest, the best, and checkpoints of other programs stay.
        """
        self._written.append(newest)
        there = [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name) and _is_own(path)]
        there.sort(key=lambda path: (path in self._written, int(path.name.rpartition("-")[2])))
        limit, best = self.args.save_total_limit or len(there), self.state.best_model_checkpoint
        protected = {newest.name, *([] if best is None else [Path(best).name])}
        candidates = [path for path in there if path.name not in protected]
        for old in candidates[: max(0, len(there) - max(limit, len(protected)))]:
            discard(old)


def _is_own(path: Path) -> bool:
    return not path.is_symlink() and ((path / TRAINED).is_file() or (path / sharded_checkpoint.FOLDER).is_dir())
