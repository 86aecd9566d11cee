"""Stage 2: train the copies of an expanded checkpoint on packed domain documents, and write the tuned checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adept_fast import checkpoint
from adept_fast.artefacts import remove_leftovers
from adept_fast.data.documents import Documents
from adept_fast.data.items import Item
from adept_fast.data.packing import Blocks, document_order
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion import load_first_importance
from adept_fast.families import layers_path
from adept_fast.tuning.callback import AdeptCallback
from adept_fast.tuning.isolation import keeps_documents_apart
from adept_fast.tuning.log import TrainerLog
from adept_fast.tuning.rates import MAPS
from adept_fast.tuning.trainer import AdeptTrainer
from adept_fast.units import GRANULARITIES

MANY_EPOCHS = 4  # repeated text beyond this teaches little and is memorised


@dataclass(frozen=True)
class TuningSettings:
    """What steers a run beside TrainingArguments (`training`: their names and values)."""

    units: str = "tensor"
    rate_map: str = "rank"
    refresh_steps: int = 500
    block_size: int = 1024
    seed: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, known before the first step. tokens: processed in all, padding included; epochs: passes over blocks."""

    documents: int
    corpus_tokens: int
    blocks: int
    block_size: int
    steps: int
    tokens_per_step: int
    epochs: float
    one_per_row: bool

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def __str__(self) -> str:
        rows = "one document a row" if self.one_per_row else "packed"
        return (
            f"plan: {self.steps:,} steps of {self.tokens_per_step:,} tokens = {self.tokens:,} tokens, {self.epochs:.2f} epochs over "
            f"{self.documents:,} documents ({self.corpus_tokens:,} tokens in {self.blocks:,} blocks of {self.block_size}, {rows})"
        )

    @property
    def warning(self) -> str | None:
        if self.epochs <= MANY_EPOCHS:
            return None
        return f"warning: {self.epochs:.1f} epochs over the same text; above {MANY_EPOCHS} it is memorised rather than learnt"


def arguments(settings: TuningSettings, folder: Path, quiet: bool) -> TrainingArguments:
    """TrainingArguments with defaults that suit: every step logged, a checkpoint at each refresh, the last one kept."""
    given = {
        "logging_steps": 1,
        "save_steps": settings.refresh_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": quiet,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        **settings.training,
    }
    try:
        return TrainingArguments(output_dir=str(folder), **given)
    except (TypeError, ValueError) as error:
        raise InputError(f"tune: {str(error).splitlines()[0]}") from None


def plan(
    documents: Documents, weights: np.ndarray, settings: TuningSettings, positions: int, pad_token: int = 0, one_per_row: bool = False
) -> tuple[Plan, Blocks]:
    """What tuning is going to do, and the blocks it will do it on. positions: the most tokens the model takes."""
    if settings.block_size < 2:
        raise InputError(f"tune.block_size must be 2 or more, found {settings.block_size}")
    block_size = min(settings.block_size, positions)
    blocks = Blocks(documents, document_order(len(documents), weights, settings.seed), block_size, pad_token, one_per_row)
    args = arguments(settings, Path("unused"), quiet=True)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if not len(blocks):
        raise InputError("domain: its weights leave no document of two tokens or more to train on")
    in_epoch = math.ceil(len(blocks) / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(in_epoch * args.num_train_epochs)
    tokens_per_step = per_step * block_size
    return Plan(len(documents), blocks.tokens, len(blocks), block_size, steps, tokens_per_step, steps / in_epoch, one_per_row), blocks


def tune_checkpoint(
    expanded: Path,
    target: Path,
    documents: Documents,
    weights: np.ndarray,
    steering: Sequence[Item],
    monitors: Mapping[str, Sequence[Item]],
    settings: TuningSettings,
    *,
    work: Path,
    log: Path,
    inputs: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **loading: Any,
) -> None:
    """Train and write `target` (a whole checkpoint in the source's dtype). A killed run goes on from its last checkpoint in `work`.

    weights: passes over each document in one epoch. monitors: held-out items, name -> items, whose loss is logged.
    Raises InputError for settings that do not fit and ExpansionError when training reached what it must not touch.
    """
    model = checkpoint.load_model(expanded, **loading)
    tokenizer = checkpoint.load_tokenizer(expanded)
    args = arguments(settings, work, quiet)
    padding = tokenizer.pad_token_id or 0
    positions = checkpoint.positions(expanded)
    planned, blocks = plan(documents, weights, settings, positions, padding)
    if not keeps_documents_apart(model, blocks):
        planned, blocks = plan(documents, weights, settings, positions, padding, one_per_row=True)
        say(f"{model.config.model_type} leaks across packed documents, so it trains one document a row; {planned}")
    events = TrainerLog(log)
    if work.is_dir():
        remove_leftovers(work)
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if last is None:
        log.unlink(missing_ok=True)
        events.write("plan", 0, steps=planned.steps, tokens=planned.tokens, epochs=planned.epochs, documents=planned.documents)
    else:
        say(f"resuming from {Path(last).name}")
    adept = AdeptCallback(
        steering,
        settings.units,
        settings.refresh_steps,
        settings.rate_map,
        first=load_first_importance(expanded),
        monitors=monitors,
        log=events,
        tokens_per_step=planned.tokens_per_step,
        say=say,
        quiet=quiet,
    )
    trainer = AdeptTrainer(model, args, adept=adept, train_dataset=blocks)
    trainer.remove_callback(PrinterCallback)  # each step stands in the log; what is printed are the evaluations
    if last is not None and _step(last) >= planned.steps:  # killed after the last step: the Trainer would make one more
        trainer._load_from_checkpoint(last)
        events.cut(planned.steps)
        events.write("end", planned.steps)
    else:
        trainer.train(resume_from_checkpoint=last)
    model.adept_config = replace(model.adept_config, inputs=dict(inputs or {}))
    path = layers_path(model)
    copies = tuple(f"{path}.{layer}." for layer in model.adept_config.trained)

    def prove(written: Path) -> None:
        touched = [name for name in checkpoint.differing_tensors(expanded, written) if not name.startswith(copies)]
        if touched:
            raise ExpansionError(f"training changed {len(touched)} tensors that it must not touch, first {touched[0]}")

    checkpoint.save(model, expanded, target, prove=prove)


def check_settings(settings: TuningSettings) -> None:
    """Raise InputError for settings that tune_checkpoint would refuse, before hours of work."""
    for key, value, known in (("units", settings.units, GRANULARITIES), ("rate_map", settings.rate_map, tuple(MAPS))):
        if value not in known:
            raise InputError(f"tune.{key} must be one of {', '.join(known)}, found {value!r}")
    args = arguments(settings, Path("unused"), quiet=True)
    if args.save_only_model:
        raise InputError("tune.save_only_model: a killed run could not go on with its rates and moments: leave it at false")
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise InputError("tune.eval_strategy: held-out losses are logged every tune.refresh_steps: leave it at no")
    optimizer, options = AdeptTrainer.get_optimizer_cls_and_kwargs(args)
    try:
        optimizer([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **options)
    except ValueError as error:
        raise InputError(f"tune: {error}") from None


def _step(folder: str) -> int:
    return int(folder.rpartition("-")[2])
