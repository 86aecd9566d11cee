"""AdeptTrainer: transformers' Trainer that trains copies only, with unit-wise rates and checkpoints of what changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from adept_fast.artefacts import staged_folder
from adept_fast.errors import InputError
from adept_fast.expansion import freeze_original
from adept_fast.optim import AdamW
from adept_fast.record import record_of
from adept_fast.tuning.callback import AdeptCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COPIES = "adept_copies.safetensors"
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused")


class AdeptTrainer(Trainer):
    """Trainer(model, args, ..., adept=AdeptCallback(...)) for an expanded model.

    Freezes all but the copies, steps them with adept_fast.AdamW (an fp32 master copy where they are bf16 or fp16), and switches the
    cache off, as packed documents need it. Its checkpoints hold the copies, their optimizer state, rates and data position, and are
    staged and renamed; `save_model()` writes the whole model. Raises InputError for a model that was not expanded.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *, adept: AdeptCallback, **kwargs: Any) -> None:
        record_of(model)
        freeze_original(model)
        model.config.use_cache = False
        self._staging: Path | None = None
        super().__init__(model, args, **kwargs)
        self.add_callback(adept)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, dict[str, Any]]:
        optim = str(getattr(args.optim, "value", args.optim))
        if optim not in PLAIN_ADAMW:
            raise InputError(f"tune.optim={optim}: unit-wise rates need adept_fast.AdamW: leave optim at its default")
        trained = [] if model is None else [parameter for parameter in model.parameters() if parameter.requires_grad]
        low_precision = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained)
        return AdamW, {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            **({"master_weights": "copy", "state_dtype": torch.float32} if low_precision else {}),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {
                name: parameter.detach().contiguous() for name, parameter in self.model.named_parameters() if parameter.requires_grad
            }
            save_file(trained, folder / COPIES)
            record_of(self.model).save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        path = Path(resume_from_checkpoint) / COPIES
        if not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
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
        """Staged and renamed where one process writes; with several, each writes files of its own and the Trainer's way stays."""
        if self.args.world_size > 1:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial))
        final = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if final.exists():
            shutil.rmtree(final)
        with staged_folder(final) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            written = staging / final.name
            for file in written.iterdir():
                file.rename(staging / file.name)
            written.rmdir()
        rotate_checkpoints(str(folder), save_total_limit=self.args.save_total_limit, use_mtime=True)
