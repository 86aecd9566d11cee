"""AdeptTrainer: transformers' Trainer that trains copies only, with unit-wise rates and checkpoints of what changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from adept_fast import distributed
from adept_fast.errors import InputError
from adept_fast.expansion import freeze_original
from adept_fast.optim import AdamW
from adept_fast.record import record_of
from adept_fast.saliency import bare
from adept_fast.tuning import sharded
from adept_fast.tuning.callback import AdeptCallback, adamw
from adept_fast.tuning.groups import flattened
from adept_fast.tuning.order import WholeSteps
from adept_fast.tuning.rates import apply_rates
from adept_fast.tuning.step import fast_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIES = "adept_copies.safetensors"
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused")


class AdeptTrainer(Trainer):
    """Trainer(model, args, ..., adept=AdeptCallback(...)) for an expanded model.

    Freezes all but the copies, takes the loss without logits (see fast_step), steps with adept_fast.AdamW (exact fp32 masters where the
    copies are bf16 or fp16), and switches the cache off, as packed documents need it. Its checkpoints hold the copies, their optimizer
    state, rates and data position, and are staged and renamed, by all processes together where they are several (a shared file system);
    `save_model()` writes the whole model. Raises InputError for a model that was not expanded.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *, adept: AdeptCallback, **kwargs: Any) -> None:
        record_of(model)
        freeze_original(model)
        model.config.use_cache = False
        self._staging: Path | None = None
        self._adept = adept
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1):
            raise flattened("DeepSpeed ZeRO" if self.is_deepspeed_enabled else "FSDP1")
        self.add_callback(adept)
        adept.on_init_end(args, self.state, self.control, model)

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with fast_step(self.model):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if not sharded.shards(self.model):
                trained = {
                    name: parameter.detach().contiguous() for name, parameter in self.model.named_parameters() if parameter.requires_grad
                }
                save_file(trained, folder / COPIES)
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
        path = Path(resume_from_checkpoint) / COPIES
        self._adept.resumed_from = resume_from_checkpoint
        if (path.parent / sharded.FOLDER).is_dir():
            sharded.load_copies(self.model, path.parent)
            return
        if not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if sharded.shards(self.model):
            raise InputError(f"{path.parent}: of a run that sharded nothing: resume it without FSDP, or delete it to start again")
        parameters = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        saved = load_file(path)
        if set(saved) != set(parameters):
            raise InputError(f"{path}: holds other copies than this model has: delete the checkpoint, or resume with the model it is from")
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        leads = distributed.rank() == 0
        if final.exists() and leads:
            shutil.rmtree(final)
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
        if leads:
            rotate_checkpoints(str(folder), save_total_limit=self.args.save_total_limit, use_mtime=True)
