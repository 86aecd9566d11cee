"""The table of a step's updates that native code reads, filled column by column."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from operator import lt, mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import WORD, WORDS, TensorRow
from adept_fast.ops.adamw.eight_bit import BLOCK
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.number_formats import FORMATS, MODES

GRAD_SHIFT, MOMENTS_SHIFT = 2, 4  # positions in the word `formats`
ROW_BYTES = 8 * WORDS
_IS_SHORT = (False, True, True, False)  # whether a parameter is bf16 or fp16, by FORMATS
_GRAD_BYTES = tuple((4, 2, 2, 8)[formats >> GRAD_SHIFT & 3] for formats in range(128))  # bytes per element, by the word `formats`


class Columns(NamedTuple):
    """The updates of a table, field by field."""

    param: tuple[Tensor, ...] = ()
    grad: tuple[Tensor, ...] = ()
    exp_avg: tuple[Tensor, ...] = ()
    exp_avg_sq: tuple[Tensor, ...] = ()
    max_exp_avg_sq: tuple[Tensor | None, ...] = ()
    master: tuple[Tensor | None, ...] = ()
    step: tuple[Tensor, ...] = ()
    multipliers: tuple[Tensor | None, ...] = ()
    length: tuple[int, ...] = ()
    inner: tuple[int, ...] = ()
    first_index: tuple[int, ...] = ()
    seed: tuple[int, ...] = ()
    options: tuple[AdamWOptions, ...] = ()
    exp_avg_scale: tuple[Tensor | None, ...] = ()
    exp_avg_sq_scale: tuple[Tensor | None, ...] = ()
    row: tuple[int, ...] = ()


class Table:
    """Rows of `updates` (or of their fields), all on one device. The word `group` is an index of `options`.

    recurs: whether later steps are likely to have the same rows, so that backends keep them on the device.
    """

    def __init__(self, updates: Sequence[Update | tuple[Any, ...]], recurs: bool = True) -> None:
        self.recurs = recurs
        self.columns = each = Columns(*zip(*updates, strict=True))
        ids = list(map(id, each.options))
        options = dict(zip(ids, each.options, strict=True))
        self.options = list(options.values())
        numbers = {key: number for number, key in enumerate(options)}
        dtypes = zip(each.param, each.grad, each.exp_avg, strict=True)
        formats = [FORMATS[p.dtype] | FORMATS[g.dtype] << GRAD_SHIFT | FORMATS[m.dtype] << MOMENTS_SHIFT for p, g, m in dtypes]
        # Column by column: half of the time of row by row.
        columns: TensorRow[Iterable[int]] = TensorRow(
            param=map(Tensor.data_ptr, each.param),
            grad=map(Tensor.data_ptr, each.grad),
            exp_avg=map(Tensor.data_ptr, each.exp_avg),
            exp_avg_sq=map(Tensor.data_ptr, each.exp_avg_sq),
            max_exp_avg_sq=_addresses(each.max_exp_avg_sq),
            master=_addresses(each.master),
            step=map(Tensor.data_ptr, each.step),
            multipliers=_addresses(each.multipliers),
            numel=map(Tensor.numel, each.param),
            length=each.length,
            inner=each.inner,
            first_index=each.first_index,
            seed=each.seed,
            group=map(numbers.__getitem__, ids),
            formats=formats,
            mode=[MODES[o.master_weights] if _IS_SHORT[word & 3] else 0 for word, o in zip(formats, each.options, strict=True)],
            exp_avg_scale=_addresses(each.exp_avg_scale),
            exp_avg_sq_scale=_addresses(each.exp_avg_sq_scale),
            row=each.row,
        )
        self.rows = array("q", bytes(ROW_BYTES * len(self)))
        for word, column in enumerate(columns):
            self.rows[word::WORDS] = array("q", column)

    @property
    def updates(self) -> list[Update]:
        return [Update(*fields) for fields in zip(*self.columns, strict=True)]

    def __len__(self) -> int:
        return len(self.columns.param)

    def fingerprint(self) -> list[bytes]:
        """Return each row without the gradient's address and the group, which may change from step to step."""
        rows = array("q", self.rows)
        rows[WORD.grad :: WORDS] = rows[WORD.group :: WORDS] = array("q", bytes(8 * len(self)))
        content = rows.tobytes()
        return [content[first : first + ROW_BYTES] for first in range(0, len(content), ROW_BYTES)]

    def misfits(self) -> set[int]:
        """Return the indices of updates whose checked tensors have changed in number of elements, storage, device or sign."""
        each, numels = self.columns, self.rows[WORD.numel :: WORDS]
        found: set[int] = set()
        for column in (each.grad, each.exp_avg, each.exp_avg_sq):
            if array("q", map(Tensor.numel, column)) != numels:
                found.update(i for i, tensor in enumerate(column) if tensor.numel() != numels[i])
        per_row = zip(numels, each.row, strict=True) if any(each.row) else ()
        blocks = [numel // row * -(-row // BLOCK) if row else 0 for numel, row in per_row]
        optional = ((each.max_exp_avg_sq, numels), (each.master, numels), (each.exp_avg_scale, blocks), (each.exp_avg_sq_scale, blocks))
        for tensors, sizes in optional:
            places, present = _present(tensors)
            found.update(i for i, size in zip(places, map(Tensor.numel, present), strict=True) if size != sizes[i])
        needed = list(map(mul, numels, map(_GRAD_BYTES.__getitem__, self.rows[WORD.formats :: WORDS])))
        if any(map(Tensor.storage_offset, each.grad)):
            needed = [size + grad.storage_offset() * grad.element_size() for size, grad in zip(needed, each.grad, strict=True)]
        held = list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, each.grad)))
        if any(map(lt, held, needed)):
            found.update(i for i, (there, size) in enumerate(zip(held, needed, strict=True)) if there < size)
        if len({*map(Tensor.get_device, each.grad), *map(Tensor.get_device, each.param[:1])}) > 1:
            found.update(i for i, (param, grad) in enumerate(zip(each.param, each.grad, strict=True)) if param.device != grad.device)
        if any(map(Tensor.is_neg, each.grad)):  # lazily negated: the memory has the opposite sign
            found.update(i for i, grad in enumerate(each.grad) if grad.is_neg())
        addresses = self.rows[WORD.grad :: WORDS]
        if 0 in addresses:
            found.update(i for i, address in enumerate(addresses) if address == 0 and numels[i] > 0)
        return found


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    addresses = [0] * len(tensors)
    places, present = _present(tensors)
    for place, address in zip(places, map(Tensor.data_ptr, present), strict=True):
        addresses[place] = address
    return addresses


def _present(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Return the tensors of a column, and their places. `None in tensors` would compare, which takes a tensor 30 us."""
    places = [i for i, tensor in enumerate(tensors) if tensor is not None]
    return places, [tensor for tensor in tensors if tensor is not None]
