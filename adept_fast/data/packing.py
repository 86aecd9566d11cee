"""Pack documents end to end into blocks of fixed length, each isolated from its neighbours by restarting position_ids.

From position_ids, without attention_mask and with use_cache=False, transformers builds a mask that separates documents. An all-ones
attention_mask or a cache silently disables it. The first label of each document in a block is -100, because nothing before may predict it.
A document that does not fit continues in the next block as a document of its own, behind the tokens with which the tokenizer begins every
text (a model trained with BOS has a high loss without it). Its first own label is -100 too. Flash attention takes no such mask, so its
blocks are passed `flattened`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from adept_fast.data.documents import Documents
from adept_fast.data.items import IGNORE
from adept_fast.errors import InputError

SHORTEST = 16  # tokens of a piece; an eighth of a block if that is less


@dataclass(frozen=True)
class Cut:
    """The rule by which documents are cut into pieces.

    Without begin tokens a document is cut wherever a block ends. With them no piece is shorter than SHORTEST tokens: begin tokens would be
    much of it, and its text would have little context. The block ends early instead, by less than twice SHORTEST.

    begin: number of tokens before every text; InputError is raised if they would be more than a quarter of a block
    """

    block_size: int
    begin: int

    def __post_init__(self) -> None:
        least = 4 * (self.begin + 1)
        if self.begin and self.block_size < least:
            found = f"block_size={self.block_size}: too small for a tokenizer that begins every text with {self.begin} tokens"
            raise InputError(f"{found}: give {least} or more", "block_size")

    @property
    def shortest(self) -> int:
        return self.begin + min(SHORTEST, self.block_size // 8) if self.begin else 0

    def __call__(self, length: int, room: int) -> int:
        """Return how many of `length` tokens, begin included, go into a block with `room` left; 0 to end the block."""
        if length <= room:
            return length
        count = min(room, length - self.shortest)
        return count if count >= self.shortest else 0


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of one.

    ids: its tokens
    inserted: how many of them are begin tokens written before a continued piece
    continues: whether it continues a document; set for pieces of a stream
    """

    ids: np.ndarray
    inserted: int = 0
    continues: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def divided(self, count: int, begin: np.ndarray) -> tuple[Piece, Piece]:
        """Split into the first `count` tokens, and the rest as a continued piece."""
        rest = self.ids[count:]
        then = Piece(np.concatenate([begin, rest]), len(begin), continues=True) if len(rest) else Piece(rest)
        return replace(self, ids=self.ids[:count]), then


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of `block_size` tokens: input_ids, labels and position_ids, each int64 [block_size].

    one_per_row: put one document, or one piece, into each block, for models that leak across packed documents
    """

    def __init__(self, documents: Documents, order: np.ndarray, block_size: int, pad_token: int = 0, one_per_row: bool = False) -> None:
        self.block_size, self.pad_token = block_size, pad_token
        self._documents, cut = documents, Cut(block_size, len(documents.begin))
        self._pieces: list[list[tuple[int, int, int]]] = []  # per block: [start, stop) in documents.ids, and the begin tokens before
        room = 0
        for document in order:
            start, stop, inserted = int(documents.starts[document]), int(documents.starts[document + 1]), 0
            while start < stop:
                if room == 0 or one_per_row:
                    self._pieces.append([])
                    room = block_size
                length = cut(inserted + stop - start, room)
                if length:
                    self._pieces[-1].append((start, start + length - inserted, inserted))
                    start += length - inserted
                    room, inserted = room - length, cut.begin
                else:
                    room = 0
        # A block of single tokens has no target: its mean loss would be 0 / 0.
        self._pieces = [pieces for pieces in self._pieces if any(stop - start > 1 for start, stop, _ in pieces)]

    def __len__(self) -> int:
        return len(self._pieces)

    def alone(self, document: int) -> Blocks:
        """Return the blocks of one document, packed with no other."""
        return Blocks(self._documents, np.array([document]), self.block_size, self.pad_token)

    def documents(self, index: int) -> list[int]:
        """Return the lengths of the documents in a block, in order."""
        return [stop - start + inserted for start, stop, inserted in self._pieces[index]]

    def continues(self, index: int) -> list[bool]:
        """Whether each piece in a block continues a document from an earlier block."""
        starts = self._documents.starts
        return [bool(starts[np.searchsorted(starts, start)] != start) for start, _, _ in self._pieces[index]]

    @property
    def tokens(self) -> int:
        """Return the number of document tokens, without padding and without the begin tokens of continued pieces."""
        return sum(stop - start for block in self._pieces for start, stop, _ in block)

    def first_pieces(self, blocks: int) -> Iterator[tuple[Piece, bool]]:
        """Yield each piece of the first `blocks` blocks, and whether it continues a document."""
        for index in range(min(blocks, len(self))):
            yield from zip(self._block(index), self.continues(index), strict=True)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return packed(self._block(index), self.block_size, self.pad_token)

    def _block(self, index: int) -> list[Piece]:
        ids, begin = self._documents.ids, self._documents.begin
        return [Piece(np.concatenate([begin[:inserted], ids[start:stop]]), inserted) for start, stop, inserted in self._pieces[index]]


def packed(pieces: Sequence[Piece], block_size: int, pad_token: int) -> dict[str, torch.Tensor]:
    """Pack documents, or pieces of them, end to end into one block."""
    ids = np.full(block_size, pad_token, dtype=np.int64)
    labels = np.full(block_size, IGNORE, dtype=np.int64)
    positions = np.empty(block_size, dtype=np.int64)
    at = 0
    for piece in pieces:
        end, known = at + len(piece), piece.inserted + 1
        ids[at:end] = piece.ids
        labels[at + known : end] = piece.ids[known:]
        positions[at:end] = np.arange(end - at)
        at = end
    positions[at:] = np.arange(block_size - at)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "position_ids": torch.from_numpy(positions)}


def flattened(blocks: Sequence[Mapping[str, torch.Tensor]], boundaries: bool = True) -> dict[str, torch.Tensor | int]:
    """Join blocks into one row, each tensor int64 [1, blocks x block_size]: flash attention would take each of several rows for a document.

    boundaries: add cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1], and max_length_q and max_length_k, tokens; otherwise
        transformers derives them from position_ids in every layer
    """
    row = {name: torch.cat([block[name] for block in blocks])[None] for name in blocks[0]}
    if not boundaries:
        return {**row}
    starts = (row["position_ids"][0] == 0).nonzero()[:, 0]
    starts = torch.cat([starts, starts.new_tensor([row["position_ids"].numel()])]).int()
    longest = int(starts.diff().max())
    return {**row, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def document_order(documents: int, weights: np.ndarray, seed: int) -> np.ndarray:
    """Draw the document indices of one epoch in random order: floor(weight) times each, and once more with the fraction's probability."""
    random = np.random.default_rng(seed)
    times = np.floor(weights).astype(np.int64) + (random.random(documents) < weights - np.floor(weights))
    return random.permutation(np.repeat(np.arange(documents), times))
