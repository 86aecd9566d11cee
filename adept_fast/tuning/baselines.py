"""Train a baseline without copies, the whole model or LoRA, by the same Trainer, data and log as the copies."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import versions
from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.checkpoints.one_model import OneModel
from adept_fast.data.items import Item
from adept_fast.errors import ExpansionError, InputError
from adept_fast.models.decoder_layers import text_config
from adept_fast.models.finite import require_finite_tensors
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import replaced_folder, staged_folder, write_json
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.optional_packages import optional
from adept_fast.settings.validation import Range, require
from adept_fast.tuning import sharded_checkpoint
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.training_plan import PlannedText
from adept_fast.tuning.training_run import Run, RunFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "baseline.json"


@dataclass(frozen=True)
class Prepared:
    """A model ready for its baseline's training.

    model: the module to train. merged: returns the plain model after training. may_change: whether training may change the tensor of
    that name. settings: for baseline.json.
    """

    model: nn.Module
    merged: Callable[[], Any]
    may_change: Callable[[str], bool]
    settings: Mapping[str, Any]


def check_rank(model: PreTrainedModel, rank: int) -> None:
    """Raise InputError for a LoRA rank above the model's width."""
    require("rank", rank, int, Range(1, text_config(model).hidden_size, why="the model's width"))


def prepare(model: PreTrainedModel, method: str, rank: int, seed: int) -> Prepared:
    """Set which parameters of `model` are trained. rank: of the LoRA matrices, whose scale alpha / rank is 2."""
    if method != "lora":
        model.requires_grad_(True)
        return Prepared(model, lambda: model, lambda name: True, {})
    peft = optional("peft", "lora", "method=lora")
    torch.manual_seed(seed)  # LoRA's first matrices are random
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT uses a name that transformers 5 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    adapted = {name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    settings = {"rank": rank, "alpha": 2 * rank, "modules": sorted(adapted)}
    return Prepared(wrapped.get_base_model(), wrapped.merge_and_unload, lambda name: name.removesuffix(".weight") in adapted, settings)


def tune_baseline(
    source: str | os.PathLike[str],
    target: Path,
    method: str,
    text: PlannedText,
    monitors: Mapping[str, Sequence[Item]],
    files: RunFiles,
    *,
    rank: int,
    models: OneModel | None = None,
    **loading: Any,
) -> None:
    """Train the checkpoint `source` by `method`, and write `target`, a plain checkpoint with baseline.json.

    The other arguments are those of `tune_checkpoint`. Raises ExpansionError where training changed a tensor that the method must not
    touch, or no tensor at all.
    """
    models, settings, folder = models or OneModel(**loading), text.settings, ModelFolder.of(source)
    model = models.take(folder)
    if method == "lora":
        check_rank(model, rank)
    run = Run.begin(model, folder, text, files)
    prepared = prepare(model, method, rank, settings.seed)
    trained = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    monitor = Monitor(
        monitors,
        run.monitor_steps or settings.refresh_steps,
        run.log,
        run.planned.tokens_per_step,
        settings.skip_nonfinite,
        run.tokenizer,
    )
    given = {"train_dataset": run.blocks, "data_collator": run.collate, "extend": settings.extend}
    trainer = StagedTrainer(prepared.model, run.args, callbacks=[monitor], **given)
    if trainer.is_fsdp_enabled and method == "lora":
        raise InputError("method=lora: not under FSDP, which would shard its matrices: start it under DDP")
    made_with = run.finish(trainer)
    if in_shards(trainer.model):
        merged: Any = models.take(folder)
        merged.load_state_dict(sharded_checkpoint.gathered(trainer.model), strict=False)
    else:
        merged = prepared.merged()
    base = models.load(folder).state_dict()
    changed = [name for name, tensor in merged.state_dict().items() if not tensor.cpu().equal(base[name])]
    touched = [name for name in changed if not prepared.may_change(name)]
    if touched or not changed:
        raise ExpansionError(f"training by {method} changed " + (f"{touched[0]}, which it must not touch" if touched else "nothing"))
    if distributed.rank() == 0:
        merged.to(_dtype(folder.config, merged))
        require_finite_tensors(merged.named_parameters(), str(target), "training went wrong: start again with a lower learning rate")
        with replaced_folder(target) as new, staged_folder(new) as staging:
            merged.save_pretrained(staging)
            checkpoint.carry_files(folder.path, staging)
            inputs = made_with.added_to(files.inputs)
            made = {"trained": trained, "changed_tensors": len(changed), "tensors": len(base), **prepared.settings}
            record = {"schema": 1, "method": method, "inputs": inputs, "versions": versions(), **made}
            write_json(staging / FILE, record)
            files.write_card(staging, record, target)
    distributed.barrier()


def _dtype(config: Mapping[str, Any], model: PreTrainedModel) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if name else model.dtype
