"""First pieces of documents against later ones: a model that reads the later ones as worse text has not been trained on what blocks hold.

A document longer than a block is cut, and its later pieces begin in the middle of it. Whoever trains on what a model has never seen (no
begin-of-sequence token, most often) sees it learn that, and takes it for knowledge of the domain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adept_fast.data.encoding import Encoder
from adept_fast.data.items import IGNORE, Item
from adept_fast.data.packing import Blocks
from adept_fast.data.stream import Stream
from adept_fast.models.losses import corpus_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECES = 24  # of each kind
TOKENS = 128  # of each, and half of that at least
FEWEST = 8
BLOCKS = 256  # to look for them in
CHANCE = 3.0  # standard errors


@dataclass(frozen=True)
class PieceLosses:
    """Mean loss of first and of later pieces, nats per token; error: the standard error of each mean over pieces; pieces: of each kind."""

    first: float
    later: float
    first_error: float
    later_error: float
    first_pieces: int
    later_pieces: int

    @property
    def error(self) -> float:
        return math.hypot(self.first_error, self.later_error)

    @property
    def differ(self) -> bool:
        """Whether later pieces lose more than first ones, by more than chance."""
        enough = min(self.first_pieces, self.later_pieces) >= FEWEST
        return enough and self.later - self.first > CHANCE * self.error

    def __str__(self) -> str:
        first, later = f"{self.first:.2f} +- {self.first_error:.2f}", f"{self.later:.2f} +- {self.later_error:.2f}"
        return f"first pieces {first} nats per token ({self.first_pieces}), later pieces {later} ({self.later_pieces})"


def pieces_of(blocks: Blocks | Stream, most: int) -> Iterator[tuple[Item, bool]]:
    """Each piece of the first `most` blocks as the block has it, and whether it goes on with a document."""
    for piece, later in blocks.first_pieces(most):
        ids, known = tuple(piece.ids.tolist()), piece.inserted + 1
        yield Item(ids, (IGNORE,) * known + ids[known:]), later


def warning(found: PieceLosses | None, encoder: Encoder) -> str | None:
    """What is said of pieces that differ."""
    if found is None or not found.differ:
        return None
    tokenizer, begin = encoder.tokenizer, encoder.begin
    how = repr("".join(tokenizer.convert_ids_to_tokens(begin))) if begin else "nothing"
    named = not begin and tokenizer.bos_token is not None
    remedy = f"; if it was trained with {tokenizer.bos_token!r} before each, set add_bos_token in tokenizer_config.json" if named else ""
    return f"warning: {found}: more than chance; look at the documents, and whether the model knows pieces that begin with {how}{remedy}"


def compare_pieces(model: PreTrainedModel, blocks: Blocks | Stream) -> PieceLosses | None:
    """The first PIECES pieces of each kind, cut to TOKENS tokens, so that all stand in as much context. None where there are not both."""
    tokens, kinds = min(TOKENS, blocks.block_size), ([], [])
    for item, later in pieces_of(blocks, BLOCKS):
        if len(item.input_ids) >= tokens // 2 and len(kinds[later]) < PIECES:
            kinds[later].append(Item(item.input_ids[:tokens], item.labels[:tokens]))
        if min(map(len, kinds)) == PIECES:
            break
    return piece_losses(model, *kinds) if min(map(len, kinds)) > 1 else None


def piece_losses(model: PreTrainedModel, first: Sequence[Item], later: Sequence[Item]) -> PieceLosses:
    """Of two pieces of each kind or more."""
    found = [corpus_loss(model, pieces, title=title) for pieces, title in ((first, "first pieces"), (later, "later pieces"))]
    means, errors = [each.mean for each in found], []
    for each, mean in zip(found, means, strict=True):
        apart, count = each.sums - mean * each.tokens, len(each.tokens)  # the error of a ratio of sums over pieces
        errors.append(float(torch.sqrt(apart.square().sum() * count / (count - 1)) / each.tokens.sum()))
    return PieceLosses(*means, *errors, len(first), len(later))
