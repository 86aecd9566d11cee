"""Rows of a step whose updates were planned: built once, and compared with what was checked when they were described.

A plan holds while its tensors are the same objects; that their memory is still the same is seen by its address, by the number of elements
and, of gradients, which are new in every step, by the size of their storage. All of it is read column by column, some 0.3 us a parameter.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import lt, ne

import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import WORDS, tensor_rows
from adept_fast.ops.adamw.reference import Update

_GRAD, _NUMEL, _GROUP, _FORMATS = 1, 8, 13, 14
_BYTES = (4, 2, 2, 8)  # an element of each format


class Table:
    """Rows of `updates` (descriptors.py) and their options."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.updates = updates
        self.rows, self.options = tensor_rows(updates)

    def changed(self) -> list[int]:
        """Indices of planned updates whose tensors are no longer those that were checked. Rows seen for the first time are kept."""
        count, size, updates = len(self.updates), 8 * WORDS, self.updates
        seen = [update.seen for update in updates]
        rows = array("q", self.rows)
        rows[_GRAD::WORDS] = rows[_GROUP::WORDS] = array("q", bytes(8 * count))
        now = rows.tobytes()
        found: set[int] = set()
        known = [now[size * i : size * (i + 1)] if s is None or s.row is None else s.row for i, s in enumerate(seen)]
        if b"".join(known) != now:
            found.update(i for i, row in enumerate(known) if row != now[size * i : size * (i + 1)])
        for s, row in zip(seen, known, strict=True):
            if s is not None and s.row is None:
                s.row = row
        found.update(self._resized())
        return [i for i in sorted(found) if seen[i] is not None]

    def _resized(self) -> set[int]:
        columns = list(zip(*self.updates, strict=True))
        numels, grads = self.rows[_NUMEL::WORDS], columns[1]
        found: set[int] = set()
        for column in columns[1:4]:
            if array("q", map(Tensor.numel, column)) != numels:
                found.update(i for i, tensor in enumerate(column) if tensor.numel() != numels[i])
        for column in columns[4:6]:
            found.update(i for i, tensor in enumerate(column) if tensor is not None and tensor.numel() != numels[i])
        sizes = [_BYTES[formats >> 2 & 3] for formats in self.rows[_FORMATS::WORDS]]
        held = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, grads))
        needed = [size * (numel + first) for size, numel, first in zip(sizes, numels, map(Tensor.storage_offset, grads), strict=True)]
        short = list(map(lt, held, needed))
        if any(short):
            found.update(i for i, wrong in enumerate(short) if wrong)
        devices = [param.get_device() for param in columns[0]]
        if any(map(ne, map(Tensor.get_device, grads), devices)) or 0 in self.rows[_GRAD::WORDS]:
            found.update(
                i
                for i, grad in enumerate(grads)
                if grad.device != self.updates[i].param.device or (numels[i] > 0 and self.rows[_GRAD + i * WORDS] == 0)
            )
        return found
