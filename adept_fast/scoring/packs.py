"""Pack items end to end in one row, without padding. Positions restart at 0 for each item, so that attention stays within it.

An item ends behind the last position that predicts a supervised token: the losses of a causal model do not depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adept_fast.data.items import IGNORE, Item


@dataclass(frozen=True)
class Pack:
    """Some items of a corpus as one row.

    items: their indices in the corpus
    lengths: tokens of each
    ids, positions: int64 [tokens]
    rows: positions whose hidden states the head needs, int64 [rows], ascending
    targets: the token that each of them predicts, int64 [rows]
    owners: the index into `items` of each, int64 [rows]
    supervised: whether its label is supervised, bool [rows]; False occurs only in packs for the loss on all tokens
    """

    items: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    owners: Tensor
    supervised: Tensor

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Pack:
        return Pack(self.items, self.lengths, *(x.to(device) for x in vars(self).values() if isinstance(x, Tensor)))


def swept_length(item: Item, all_tokens: bool) -> int:
    """Return how many tokens of an item the model must read: up to the last position that predicts a supervised token."""
    if all_tokens:
        return len(item.labels) - 1
    return max(index for index, label in enumerate(item.labels) if label != IGNORE)


def packed(items: Sequence[Item], indices: Sequence[int], all_tokens: bool) -> Pack:
    """Pack the items at `indices`, in that order."""
    lengths = tuple(swept_length(items[index], all_tokens) for index in indices)
    ids = torch.cat([torch.tensor(items[index].input_ids[:length]) for index, length in zip(indices, lengths, strict=True)])
    following = torch.cat([torch.tensor(items[index].input_ids[1 : length + 1]) for index, length in zip(indices, lengths, strict=True)])
    labels = torch.cat([torch.tensor(items[index].labels[1 : length + 1]) for index, length in zip(indices, lengths, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(len(ids)) if all_tokens else torch.nonzero(labels != IGNORE)[:, 0]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Pack(tuple(indices), lengths, ids, positions, rows, following[rows], owners[rows], labels[rows] != IGNORE)


def pack(items: Sequence[Item], indices: Sequence[int], limit: int, all_tokens: bool = False) -> list[Pack]:
    """Make packs of at most `limit` tokens, deterministically, by first fit and longest first. A longer item is alone in its pack."""
    lengths = {index: swept_length(items[index], all_tokens) for index in indices}
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        at = next((at for at, (used, _) in enumerate(bins) if used + lengths[index] <= limit), None)
        if at is None:
            bins.append((lengths[index], [index]))
        else:
            bins[at] = (bins[at][0] + lengths[index], [*bins[at][1], index])
    return [packed(items, found, all_tokens) for _, found in bins]
