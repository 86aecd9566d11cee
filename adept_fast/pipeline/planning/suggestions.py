"""Suggest settings that differ from those given, each with its reason and where that comes from.

Rules marked "rule of thumb" are that; measured ones name what they were measured on.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from adept_fast.tuning.training_plan import MANY_EPOCHS

LAYERS_A_COPY = 8  # ADEPT (arXiv 2510.10071) copies 4 of 28 to 36 layers
COPIES_RATE, FULL_RATE, MEASURED_WIDTH = 2e-3, 1e-4, 576  # the best tried on SmolLM2-135M
FAR = 2.5  # factor between rates that is worth a line
STEPS, READINGS = 100, 8  # of a run
WHOLE_TOKENS = 0.8  # share of the corpus's tokens in documents that fit a block
LONGEST_BLOCK = 4096
FULL = 0.9  # of the memory


@dataclass(frozen=True)
class Suggestion:
    """A setting and why."""

    key: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Facts:
    """What suggestions follow from.

    layers, width: of the model. k: copies asked for, None if a budget or a list chooses them. copies: whether the method trains copies.
    lengths: tokens of each document, None for a stream. blocks: in an epoch. batch, accumulation: of one process. by_steps: max_steps is
    set. fixed, kept: bytes of memory that do not depend on the batch, and those of each token of it. capacity: bytes there are.
    """

    method: str
    layers: int
    width: int
    k: int | None
    copies: bool
    lengths: np.ndarray | None
    blocks: float
    block_size: int
    positions: int
    batch: int
    accumulation: int
    learning_rate: float
    steps: int
    by_steps: bool
    epochs: float | None
    refresh_steps: int
    fixed: float
    kept: float
    capacity: int
    checkpointing: bool


def suggest(facts: Facts) -> tuple[Suggestion, ...]:
    """Return what differs from the settings given. Steps are those of the suggested batch and block size."""
    return tuple(_suggestions(facts))


def _suggestions(facts: Facts) -> Iterator[Suggestion]:
    if facts.k is not None and facts.layers >= LAYERS_A_COPY and (k := round(facts.layers / LAYERS_A_COPY)) != facts.k:
        yield Suggestion(
            "expand.k", str(k), f"a copy for every {LAYERS_A_COPY} of the model's {facts.layers} layers, as ADEPT has 4 of 28 to 36"
        )
    if (rate := _rate(facts)) is not None and not 1 / FAR < rate / facts.learning_rate < FAR:
        best = COPIES_RATE if facts.copies else FULL_RATE
        measured = f"{best:g} was good on SmolLM2 (width {MEASURED_WIDTH}), and rates fall with width (rule of thumb)"
        yield Suggestion("tune.learning_rate", f"{rate:.1g}", measured)
    block = _block_size(facts)
    if block != facts.block_size:
        assert facts.lengths is not None
        cut = facts.lengths[facts.lengths > facts.block_size].sum() / facts.lengths.sum()
        yield Suggestion(
            "tune.block_size", str(block), f"{cut:.0%} of the tokens stand in documents longer than {facts.block_size} (rule of thumb)"
        )
    blocks = facts.blocks * facts.block_size / block
    batch, rows = facts.batch, _fitting_rows(facts, block)
    if rows < 1:
        if not facts.checkpointing:
            yield Suggestion("tune.gradient_checkpointing", "true", "one row is more than the memory: layers are computed twice instead")
        rows = 1
    if facts.epochs is not None and blocks / (batch * facts.accumulation) < STEPS and batch > 1:
        batch = max(1, int(blocks / (STEPS * facts.accumulation)))
        why = f"an epoch would be {math.ceil(blocks / (facts.batch * facts.accumulation))} steps: a schedule and its refreshes want {STEPS}"
        reason = f"{why} (rule of thumb)"
    else:
        reason = f"{facts.batch} rows are more than {FULL:.0%} of the memory"
    accumulation = facts.accumulation
    if batch > rows:
        batch, accumulation = rows, facts.accumulation * math.ceil(batch / rows)
        reason = f"{facts.batch} rows are more than {FULL:.0%} of the memory"
    if batch != facts.batch:
        yield Suggestion("tune.per_device_train_batch_size", str(batch), reason)
    if accumulation != facts.accumulation:
        yield Suggestion("tune.gradient_accumulation_steps", str(accumulation), "the same batch in parts")
    steps = yield from _steps(facts, math.ceil(blocks / (batch * accumulation)))
    if facts.refresh_steps > steps // 2:
        every = max(1, steps // READINGS)
        why = f"rates and held-out losses would be read {'once more' if facts.refresh_steps <= steps else 'at the ends only'}"
        yield Suggestion("tune.refresh_steps", str(every), f"{why}: {READINGS} readings show a course (rule of thumb)")


def _steps(facts: Facts, in_epoch: int) -> Generator[Suggestion, None, int]:
    """Suggest a number of steps, and return the one that then holds. in_epoch: with the suggested batch."""
    if facts.epochs is None:
        return facts.steps
    if facts.epochs > MANY_EPOCHS:
        reason = f"repeated text teaches little beyond {MANY_EPOCHS} epochs (arXiv 2305.16264)"
        if facts.by_steps:
            yield Suggestion("tune.max_steps", str(MANY_EPOCHS * in_epoch), reason)
        else:
            yield Suggestion("tune.num_train_epochs", str(MANY_EPOCHS), reason)
        return MANY_EPOCHS * in_epoch
    if facts.by_steps and facts.steps < in_epoch:
        read = f"{facts.steps / in_epoch:.0%} of the text"
        yield Suggestion("tune.max_steps", str(in_epoch), f"{facts.steps:,} steps of the suggested size read {read}: this is one epoch")
        return in_epoch
    return facts.steps if facts.by_steps else math.ceil(facts.epochs * in_epoch)


def _rate(facts: Facts) -> float | None:
    if facts.method == "lora":
        return None
    return (COPIES_RATE if facts.copies else FULL_RATE) * min(1, MEASURED_WIDTH / facts.width)


def _block_size(facts: Facts) -> int:
    """Return the smallest power of two from the given size up in which documents of WHOLE_TOKENS of the text fit whole."""
    if facts.lengths is None or not len(facts.lengths):
        return facts.block_size
    size, most = facts.block_size, min(facts.positions, LONGEST_BLOCK)
    while size < most and facts.lengths[facts.lengths <= size].sum() < WHOLE_TOKENS * facts.lengths.sum():
        size = min(most, 1 << size.bit_length())
    return size


def _fitting_rows(facts: Facts, block: int) -> int:
    room = FULL * facts.capacity - facts.fixed
    return int(room / (facts.kept * block)) if facts.kept else facts.batch
