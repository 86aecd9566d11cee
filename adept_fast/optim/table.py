"""The rows that native code reads about tensors and groups: structs Tensor and Group of csrc/descriptor.h, in 64-bit words."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import pack

import torch
from torch import Tensor

from adept_fast.reference import AdamWOptions, Update, needs_master

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_MODES = {None: 0, "copy": 1, "remainder": 2, "kahan": 3, "stochastic": 4}


def tensor_rows(updates: Sequence[Update]) -> tuple[array[int], list[AdamWOptions]]:
    """One row a tensor, and the options that their words `group` count in."""
    rows, options, numbers = array("q"), [], {}
    for u in updates:
        vmax, master, multipliers, param = u.max_exp_avg_sq, u.master, u.multipliers, u.param
        if id(u.options) not in numbers:
            numbers[id(u.options)] = len(options)
            options.append(u.options)
        rows.extend(
            (
                param.data_ptr(),
                u.grad.data_ptr(),
                u.exp_avg.data_ptr(),
                u.exp_avg_sq.data_ptr(),
                0 if vmax is None else vmax.data_ptr(),
                0 if master is None else master.data_ptr(),
                u.step.data_ptr(),
                0 if multipliers is None else multipliers.data_ptr(),
                param.numel(),
                u.length,
                u.inner,
                u.first_index,
                u.seed,
                numbers[id(u.options)],
                _FORMATS[param.dtype] | _FORMATS[u.grad.dtype] << 2 | _FORMATS[u.exp_avg.dtype] << 4,
                _MODES[u.options.master_weights] if needs_master(param) else 0,
            )
        )
    return rows, options


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
