"""What a run is going to do, known before the first step: documents, tokens, steps, epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adept_fast.data.documents import Documents
from adept_fast.data.packing import Blocks, document_order
from adept_fast.errors import InputError
from adept_fast.tuning.settings import TuningSettings, arguments

MANY_EPOCHS = 4  # repeated text beyond this teaches little and is memorised


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
