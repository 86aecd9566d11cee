"""AdamW on the CPU through adept_fast._C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adept_fast import _C
from adept_fast.ops.adamw.descriptors import gradient_rows, group_rows
from adept_fast.ops.adamw.table import Table


def adamw(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Backend "cpu": see adept_fast.ops.adamw.op. Uses torch.get_num_threads() threads of torch's OpenMP runtime."""
    if found_inf is not None and found_inf.item() != 0:
        return
    numbers = [o._replace(lr=float(o.lr), beta1=float(o.beta1), beta2=float(o.beta2)) for o in table.options]
    _C.adamw(table.rows, group_rows(numbers), 1.0 if grad_scale is None else grad_scale.item(), torch.get_num_threads())


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """Sum the squares of all elements of dense `grads`: fp64, 0-d, the same bits for any number of threads.

    torch's fp64 norm takes longer than an optimizer step.
    """
    return torch.tensor(_C.sum_of_squares(gradient_rows(grads), torch.get_num_threads()), dtype=torch.float64)
