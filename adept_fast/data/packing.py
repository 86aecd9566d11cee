"""Packing: documents end to end in blocks of a fixed length, each isolated from its neighbours by restarting position_ids.

Given to a model with position_ids, without attention_mask and with use_cache=False, transformers builds a mask that keeps documents
apart; an all-ones attention_mask or a cache silently undoes it. The first label of each document in a block is -100: nothing before
it may predict it. A document that does not fit goes on in the next block as a document of its own.
Flash attention takes no such mask: its blocks go `flattened`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from adept_fast.data.documents import Documents
from adept_fast.data.items import IGNORE


class Blocks(Dataset):
    """Blocks of `block_size` tokens: input_ids, labels and position_ids, each int64 [block_size].

    one_per_row: one document (or a piece of one) a block, for models that leak across packed documents.
    """

    def __init__(self, documents: Documents, order: np.ndarray, block_size: int, pad_token: int = 0, one_per_row: bool = False) -> None:
        self.block_size, self.pad_token = block_size, pad_token
        self._documents = documents
        self._pieces: list[list[tuple[int, int]]] = []  # per block: [start, stop) in documents.ids
        room = 0
        for document in order:
            start, stop = int(documents.starts[document]), int(documents.starts[document + 1])
            while start < stop:
                if room == 0 or one_per_row:
                    self._pieces.append([])
                    room = block_size
                length = min(room, stop - start)
                self._pieces[-1].append((start, start + length))
                start += length
                room -= length
        # A block of single tokens has nothing to predict: its mean loss would be 0 / 0.
        self._pieces = [pieces for pieces in self._pieces if any(stop - start > 1 for start, stop in pieces)]

    def __len__(self) -> int:
        return len(self._pieces)

    def alone(self, document: int) -> Blocks:
        """The blocks of one document, none packed with it."""
        return Blocks(self._documents, np.array([document]), self.block_size, self.pad_token)

    def documents(self, index: int) -> list[int]:
        """Lengths of the documents in a block, in order."""
        return [stop - start for start, stop in self._pieces[index]]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(stop - start for block in self._pieces for start, stop in block)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return packed([self._documents.ids[start:stop] for start, stop in self._pieces[index]], self.block_size, self.pad_token)


def packed(pieces: Sequence[np.ndarray], block_size: int, pad_token: int) -> dict[str, torch.Tensor]:
    """Token ids of documents, or pieces of them, end to end in one block."""
    ids = np.full(block_size, pad_token, dtype=np.int64)
    labels = np.full(block_size, IGNORE, dtype=np.int64)
    positions = np.empty(block_size, dtype=np.int64)
    at = 0
    for piece in pieces:
        end = at + len(piece)
        ids[at:end] = piece
        labels[at + 1 : end] = piece[1:]
        positions[at:end] = np.arange(end - at)
        at = end
    positions[at:] = np.arange(block_size - at)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "position_ids": torch.from_numpy(positions)}


def flattened(blocks: Sequence[Mapping[str, torch.Tensor]], boundaries: bool = True) -> dict[str, torch.Tensor | int]:
    """Blocks as one row, each tensor int64 [1, blocks x block_size]: of several rows transformers' flash attention would take each for one
    document. boundaries: say where documents begin, cu_seq_lens_q and _k int32 [documents + 1] and max_length_q and _k tokens, which
    transformers derives from position_ids otherwise, in every layer."""
    row = {name: torch.cat([block[name] for block in blocks])[None] for name in blocks[0]}
    if not boundaries:
        return row
    starts = (row["position_ids"][0] == 0).nonzero()[:, 0]
    starts = torch.cat([starts, starts.new_tensor([row["position_ids"].numel()])]).int()
    longest = int(starts.diff().max())
    return {**row, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def document_order(documents: int, weights: np.ndarray, seed: int) -> np.ndarray:
    """Document indices of one epoch in random order: floor(weight) times each, once more with the probability of the fraction."""
    random = np.random.default_rng(seed)
    times = np.floor(weights).astype(np.int64) + (random.random(documents) < weights - np.floor(weights))
    return random.permutation(np.repeat(np.arange(documents), times))
