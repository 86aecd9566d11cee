"""The rows that native code reads about tensors and groups: structs Tensor and Group of csrc/descriptor.h, in 64-bit words."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import pack
from typing import Any

import torch
from torch import Tensor

from adept_fast.ops.adamw.reference import AdamWOptions, needs_master

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
WORDS = 16  # of a row
_MODES = {None: 0, "copy": 1, "remainder": 2, "kahan": 3, "stochastic": 4}


def tensor_rows(columns: Sequence[Sequence[Any]]) -> tuple[array[int], list[AdamWOptions]]:
    """One row a tensor, and the options that their words `group` count in. columns: the fields of Update, of all tensors each."""
    params, options = columns[0], {id(o): o for o in columns[12]}
    numbers = {key: number for number, key in enumerate(options)}
    rows = array("q", bytes(8 * WORDS * len(params)))
    # Column by column, which takes Python half the time of row by row.
    for word, column in ((0, params), (1, columns[1]), (2, columns[2]), (3, columns[3]), (6, columns[6])):
        rows[word::WORDS] = array("q", map(Tensor.data_ptr, column))
    for word, column in ((4, columns[4]), (5, columns[5]), (7, columns[7])):
        rows[word::WORDS] = array("q", [0 if x is None else x.data_ptr() for x in column])
    rows[8::WORDS] = array("q", map(Tensor.numel, params))
    for word, column in enumerate(columns[8:12], 9):  # length, inner, first_index, seed
        rows[word::WORDS] = array("q", column)
    rows[13::WORDS] = array("q", [numbers[id(o)] for o in columns[12]])
    formats = zip(params, columns[1], columns[2], strict=True)
    rows[14::WORDS] = array("q", [_FORMATS[p.dtype] | _FORMATS[g.dtype] << 2 | _FORMATS[m.dtype] << 4 for p, g, m in formats])
    modes = zip(params, columns[12], strict=True)
    rows[15::WORDS] = array("q", [_MODES[o.master_weights] if o.master_weights and needs_master(p) else 0 for p, o in modes])
    return rows, list(options.values())


def gradient_rows(grads: Sequence[Tensor]) -> array[int]:
    """One row of struct Gradient of csrc/cpu_adamw.h a tensor: address, numel, format."""
    return array("q", [word for g in grads for word in (g.data_ptr(), g.numel(), _FORMATS[g.dtype])])


def group_rows(options: Sequence[AdamWOptions]) -> bytes:
    """One row a group: lr, beta1, beta2, eps, weight_decay, maximize (fp64), then the addresses of lr, beta1 and beta2 where they are
    tensors (fp32 or fp64, on the device of what they update), and which they are (2 bits each; fp32 1, fp64 2)."""
    rows = bytearray()
    for o in options:
        scalars = (o.lr, o.beta1, o.beta2)
        numbers = [0.0 if isinstance(x, Tensor) else x for x in scalars]
        addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 for x in scalars]
        kinds = sum((1 if x.dtype == torch.float32 else 2) << 2 * i for i, x in enumerate(scalars) if isinstance(x, Tensor))
        rows += pack("6d4q", *numbers, o.eps, o.weight_decay, float(o.maximize), *addresses, kinds)
    return bytes(rows)
