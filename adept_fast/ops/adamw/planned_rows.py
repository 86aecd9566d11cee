"""The table of a step's updates: built once, and compared with what was checked when they were described.

A plan holds while its tensors are the same objects. That their memory is still the same is seen by its address, by the number of elements
and, of gradients, which are new in every step, by the size of their storage: read column by column, half a microsecond a parameter.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import lt, mul

import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import WORDS, tensor_rows
from adept_fast.ops.adamw.reference import Update

_GRAD, _NUMEL, _GROUP, _FORMATS = 1, 8, 13, 14
_ROW = 8 * WORDS
_GRAD_BYTES = tuple((4, 2, 2, 8)[formats >> 2 & 3] for formats in range(64))  # an element, by the word `formats`


class Table:
    """Rows of `updates`, which are on one device (descriptors.py), and their options."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.updates = updates
        self._columns = list(zip(*updates, strict=True)) or [()] * len(Update._fields)
        self.rows, self.options = tensor_rows(self._columns)

    def changed(self) -> list[int]:
        """Indices of planned updates whose tensors are no longer those that were checked. Rows seen for the first time are kept."""
        rows, seen = array("q", self.rows), self._columns[13]
        rows[_GRAD::WORDS] = rows[_GROUP::WORDS] = array("q", bytes(8 * len(seen)))
        now = rows.tobytes()
        found = self._resized()
        if None in seen or b"".join([each.row for each in seen]) != now:
            for i, each in enumerate(seen):
                row = now[_ROW * i : _ROW * (i + 1)]
                if each is not None and not each.row:
                    each.row = row
                elif each is not None and each.row != row:
                    found.add(i)
        return [i for i in sorted(found) if seen[i] is not None]

    def _resized(self) -> set[int]:
        params, grads = self._columns[:2]
        numels = self.rows[_NUMEL::WORDS]
        found: set[int] = set()
        for column in self._columns[1:4]:
            if array("q", map(Tensor.numel, column)) != numels:
                found.update(i for i, tensor in enumerate(column) if tensor.numel() != numels[i])
        for column in self._columns[4:6]:
            if column.count(None) < len(column):
                found.update(i for i, tensor in enumerate(column) if tensor is not None and tensor.numel() != numels[i])
        needed = list(map(mul, numels, map(_GRAD_BYTES.__getitem__, self.rows[_FORMATS::WORDS])))
        if any(map(Tensor.storage_offset, grads)):
            needed = [size + grad.storage_offset() * grad.element_size() for size, grad in zip(needed, grads, strict=True)]
        held = list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, grads)))
        if any(map(lt, held, needed)):
            found.update(i for i, (there, size) in enumerate(zip(held, needed, strict=True)) if there < size)
        if len({*map(Tensor.get_device, grads), *map(Tensor.get_device, params[:1])}) > 1:
            found.update(i for i, (param, grad) in enumerate(zip(params, grads, strict=True)) if param.device != grad.device)
        if any(map(Tensor.is_neg, grads)):  # whose memory has the other sign
            found.update(i for i, grad in enumerate(grads) if grad.is_neg())
        if 0 in self.rows[_GRAD::WORDS]:
            found.update(i for i, address in enumerate(self.rows[_GRAD::WORDS]) if address == 0 and numels[i] > 0)
        return found
