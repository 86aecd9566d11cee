"""Plan a training run before its first step: documents, tokens, steps, epochs, and the blocks to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adept_fast.data.documents import WeightedDocuments
from adept_fast.data.encoding import Encoder
from adept_fast.data.packing import Blocks, document_order
from adept_fast.data.stream import Stream
from adept_fast.data.streamed_text import StreamedText, shares
from adept_fast.errors import InputError
from adept_fast.tuning.tuning_settings import TuningSettings, arguments, check_warmup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

MANY_EPOCHS = 4  # repeated text beyond this teaches little and is memorised


@dataclass(frozen=True)
class Plan:
    """The size of a run. None stands for what a stream did not count, because max_steps was given.

    corpus_tokens: of the documents, without tokens inserted where a document continues. tokens: processed in all, padding included.
    epochs: passes over the blocks. fewer: whether blocks are smaller than was asked for.
    """

    documents: int | None
    corpus_tokens: int | None
    blocks: int
    block_size: int
    steps: int
    tokens_per_step: int
    epochs: float | None
    one_per_row: bool
    streamed: bool = False
    fewer: bool = False

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def __str__(self) -> str:
        rows = "one document a row" if self.one_per_row else "packed"
        work = f"plan: {self.steps:,} steps of {self.tokens_per_step:,} tokens = {self.tokens:,} tokens"
        most = " (all positions that the model has, fewer than block_size asks for)" if self.fewer else ""
        how = f"blocks of {self.block_size}{most}, {rows}"
        if self.epochs is None:
            return f"{work} (streamed, {how})"
        size = f"{self.corpus_tokens:,} tokens, streamed" if self.streamed else f"{self.corpus_tokens:,} tokens in {self.blocks:,}"
        return f"{work}, {self.epochs:.2f} epochs over {self.documents:,} documents ({size}{',' if self.streamed else ''} {how})"

    @property
    def warning(self) -> str | None:
        if self.epochs is None or self.epochs <= MANY_EPOCHS:
            return None
        return f"warning: {self.epochs:.1f} epochs over the same text; above {MANY_EPOCHS} it is memorised rather than learnt"


@dataclass(frozen=True)
class PlannedText:
    """The text to train on, packed in blocks, with its plan. positions: the most tokens that the model takes."""

    plan: Plan
    blocks: Blocks | Stream
    corpus: WeightedDocuments | StreamedText
    encoder: Encoder
    settings: TuningSettings
    positions: int

    def one_per_row(self) -> PlannedText:
        """Plan again with one document a row, for a model that attends across packed documents."""
        return plan(self.corpus, self.encoder, self.settings, self.positions, one_per_row=True)


def plan(
    corpus: WeightedDocuments | StreamedText,
    tokenizer: PreTrainedTokenizerBase | Encoder,
    settings: TuningSettings,
    positions: int,
    one_per_row: bool = False,
) -> PlannedText:
    """Plan the tuning, and pack the blocks or open the stream of them. positions: the most tokens that the model takes.

    Raises InputError where the corpus, the batch or the warmup do not fit each other.
    """
    encoder, block_size = Encoder.of(tokenizer), min(settings.block_size, positions)
    padding, fewer = encoder.tokenizer.pad_token_id or 0, block_size < settings.block_size
    args = arguments(settings, Path("unused"))
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_per_step = per_step * block_size
    if isinstance(corpus, WeightedDocuments):
        documents = corpus.documents
        order = document_order(len(documents), corpus.weights, settings.seed)
        blocks = Blocks(documents, order, block_size, padding, one_per_row)
        if not len(blocks):
            raise InputError("corpus: its weights leave no document of two tokens or more to train on", "corpus")
        steps, in_epoch = _steps(args, per_step, len(blocks))
        size = len(documents), blocks.tokens
        planned = Plan(*size, len(blocks), block_size, steps, tokens_per_step, steps / in_epoch, one_per_row, fewer=fewer)
        return PlannedText(planned, blocks, corpus, encoder, settings, positions)
    counts = _counted(corpus, encoder, args.max_steps <= 0)
    mixture = shares(corpus.sources, None if counts is None else [tokens for _, tokens in counts])
    steps = args.max_steps
    epochs: float | None = None
    counted: tuple[int | None, int | None] = (None, None)
    if counts:
        rest = [index for index, source in enumerate(corpus.sources) if source.share is None]
        total, tokens = (sum(counts[index][part] * corpus.sources[index].weight for index in rest) for part in (0, 1))
        part = sum(sum(mixture[index]) / 2 for index in rest)  # of the run's tokens, over its whole length
        each = block_size - len(encoder.begin)  # nearly all blocks continue a document
        blocks_of_rest = tokens / each + (total if one_per_row else 0)  # at most one row more for the end of each document
        steps, in_epoch = _steps(args, per_step, blocks_of_rest / part)
        epochs, counted = steps / in_epoch, (round(total), round(tokens))
    stream = Stream(
        corpus,
        mixture,
        encoder,
        blocks=steps * per_step,
        block_size=block_size,
        seed=settings.seed,
        pad_token=padding,
        one_per_row=one_per_row,
        ahead=4 * per_step,
    )
    planned = Plan(*counted, len(stream), block_size, steps, tokens_per_step, epochs, one_per_row, streamed=True, fewer=fewer)
    return PlannedText(planned, stream, corpus, encoder, settings, positions)


def _steps(args: TrainingArguments, per_step: int, blocks: float) -> tuple[int, int]:
    """Return the steps of the run and of an epoch of `blocks` blocks. Raises InputError for a batch or a warmup that is too large."""
    if per_step > MANY_EPOCHS * blocks:
        raise InputError(
            f"per_device_train_batch_size={args.per_device_train_batch_size}: a step takes {per_step:,} blocks, the corpus has "
            f"{math.ceil(blocks):,}: give a smaller one, or a smaller block_size",
            "per_device_train_batch_size",
            "block_size",
        )
    in_epoch = math.ceil(blocks / per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(in_epoch * args.num_train_epochs)
    check_warmup(args, steps)
    return steps, in_epoch


def _counted(corpus: StreamedText, encoder: Encoder, needed: bool) -> list[tuple[int, int]] | None:
    """Count (documents, tokens) of each source, in one pass, where steps or shares depend on them; otherwise None."""
    unshared = sum(source.share is None for source in corpus.sources)
    if needed and not unshared:
        raise InputError("max_steps is needed: with a share given for every source nothing says how long an epoch is", "max_steps")
    return corpus.count(encoder) if needed or unshared > 1 else None
