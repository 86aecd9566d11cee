"""Compare the loss on first pieces of documents with that on later ones, to find blocks in a form that the model was not trained on.

A document longer than a block is cut, and its later pieces begin in its middle. Where they lack what the model expects, most often a
begin-of-sequence token, training would first teach it that form, and the falling loss would look like knowledge of the domain.
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
from adept_fast.models.losses import CorpusLoss, corpus_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECES = 24  # compared, of first and of later ones
TOKENS = 128  # that a piece is cut to; it needs half as many
FEWEST = 8  # pieces for a warning
BLOCKS = 256  # searched for pieces
CHANCE = 3.0  # standard errors


@dataclass(frozen=True)
class PieceLosses:
    """Mean losses in nats per token, their standard errors over pieces, and the numbers of pieces."""

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
        """Whether the loss on later pieces is higher than on first ones by more than chance."""
        enough = min(self.first_pieces, self.later_pieces) >= FEWEST
        return enough and self.later - self.first > CHANCE * self.error

    def __str__(self) -> str:
        first, later = f"{self.first:.2f} +- {self.first_error:.2f}", f"{self.later:.2f} +- {self.later_error:.2f}"
        return f"first pieces {first} nats per token ({self.first_pieces}), later pieces {later} ({self.later_pieces})"


def pieces_of(blocks: Blocks | Stream, most: int) -> Iterator[tuple[Item, bool]]:
    """Yield each piece of the first `most` blocks, as the block has it, and whether it continues a document."""
    for piece, later in blocks.first_pieces(most):
        ids, known = tuple(piece.ids.tolist()), piece.inserted + 1
        yield Item(ids, (IGNORE,) * known + ids[known:]), later


def warning(found: PieceLosses | None, encoder: Encoder) -> str | None:
    """Return the warning to show where the pieces differ, otherwise None."""
    if found is None or not found.differ:
        return None
    tokenizer, begin = encoder.tokenizer, encoder.begin
    how = repr("".join(tokenizer.convert_ids_to_tokens(begin))) if begin else "nothing"
    named = not begin and tokenizer.bos_token is not None
    remedy = f"; if it was trained with {tokenizer.bos_token!r} before each, set add_bos_token in tokenizer_config.json" if named else ""
    return f"warning: {found}: more than chance; look at the documents, and whether the model knows pieces that begin with {how}{remedy}"


def compare_pieces(model: PreTrainedModel, blocks: Blocks | Stream) -> PieceLosses | None:
    """Compare the first pieces of each kind. None without both kinds."""
    kinds = compared_pieces(blocks)
    return piece_losses(model, *kinds) if kinds else None


def compared_pieces(blocks: Blocks | Stream) -> tuple[list[Item], list[Item]] | None:
    """Return the first PIECES first and later pieces, cut to TOKENS tokens so that all have equal context. None without two of each."""
    tokens = min(TOKENS, blocks.block_size)
    kinds: tuple[list[Item], list[Item]] = ([], [])
    for item, later in pieces_of(blocks, BLOCKS):
        if len(item.input_ids) >= tokens // 2 and len(kinds[later]) < PIECES:
            kinds[later].append(Item(item.input_ids[:tokens], item.labels[:tokens]))
        if min(map(len, kinds)) == PIECES:
            break
    return kinds if min(map(len, kinds)) > 1 else None


def piece_losses(model: PreTrainedModel, first: Sequence[Item], later: Sequence[Item]) -> PieceLosses:
    """Measure the mean losses of first and later pieces, at least two of each."""
    found = corpus_loss(model, first, title="first pieces"), corpus_loss(model, later, title="later pieces")
    return PieceLosses(found[0].mean, found[1].mean, _error(found[0]), _error(found[1]), len(first), len(later))


def _error(losses: CorpusLoss) -> float:
    """Return the standard error of a mean that is a ratio of sums over pieces."""
    residuals, count = losses.sums - losses.mean * losses.tokens, len(losses.tokens)
    return float(torch.sqrt(residuals.square().sum() * count / (count - 1)) / losses.tokens.sum())
