"""Items end to end in one row, without padding: each is told apart by positions that start again at 0.

An item is cut behind the last position that predicts a supervised token: a causal model's losses do not depend on what follows.
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

    items: their indices; lengths: tokens of each; ids, positions: int64 [tokens]. rows: positions whose hidden states the head needs, int64
    [rows], in ascending order, with the tokens that they predict (targets), the place in `items` they belong to (owners), and whether the
    item supervises them (all are, unless the loss on all tokens is wanted).
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
        return Pack(self.items, self.lengths, *(getattr(self, name).to(device) for name in TENSORS))


TENSORS = ("ids", "positions", "rows", "targets", "owners", "supervised")


def swept_length(item: Item, all_tokens: bool) -> int:
    """Tokens of an item that the model must read: up to the last position that predicts one that counts."""
    if all_tokens:
        return len(item.labels) - 1
    return max(index for index, label in enumerate(item.labels) if label != IGNORE)


def packed(items: Sequence[Item], indices: Sequence[int], all_tokens: bool) -> Pack:
    """One pack of the items at `indices`, in that order."""
    lengths = tuple(swept_length(items[index], all_tokens) for index in indices)
    ids = torch.cat([torch.tensor(items[index].input_ids[:length]) for index, length in zip(indices, lengths, strict=True)])
    following = torch.cat([torch.tensor(items[index].input_ids[1 : length + 1]) for index, length in zip(indices, lengths, strict=True)])
    labels = torch.cat([torch.tensor(items[index].labels[1 : length + 1]) for index, length in zip(indices, lengths, strict=True)])
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(len(ids)) if all_tokens else torch.nonzero(labels != IGNORE)[:, 0]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Pack(tuple(indices), lengths, ids, positions, rows, following[rows], owners[rows], labels[rows] != IGNORE)


def pack(items: Sequence[Item], indices: Sequence[int], limit: int, all_tokens: bool = False) -> list[Pack]:
    """Packs of at most `limit` tokens (a longer item alone), by first fit, longest first: the same packs for the same items."""
    lengths = {index: swept_length(items[index], all_tokens) for index in indices}
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        at = next((at for at, (used, _) in enumerate(bins) if used + lengths[index] <= limit), None)
        if at is None:
            bins.append((lengths[index], [index]))
        else:
            bins[at] = (bins[at][0] + lengths[index], [*bins[at][1], index])
    return [packed(items, found, all_tokens) for _, found in bins]
