"""Sums of gradients on the CPU, through adept_fast._C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

import adept_fast._C as _C
from adept_fast.ops.native_formats import FORMATS

INSTRUCTIONS = ""  # the best that the CPU has
THREADS = 0  # torch's


def saliency_sums(parameter: Tensor, gradient: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """See adept_fast.ops.gradient_sums.reference. Both fp32, bf16 or fp16."""
    sums = torch.zeros(3, parameter.shape[dim], dtype=torch.float64)
    SaliencyPass({dim % parameter.ndim: sums}, parameter.shape, None).add(parameter.detach(), gradient.detach())
    squares, magnitudes, products = sums.float().unbind(0)
    return squares, magnitudes, products


class SaliencyPass:
    """Adds sums of g^2, |theta g| and theta g along dimensions of a parameter's gradients to `sums`, and the gradients to `running`.

    sums: dimension -> fp64 [1, indices] (g^2 alone) or [3, indices], contiguous; running: fp32, contiguous. Parameter and gradient fp32,
    bf16 or fp16. One pass over the memory of a matrix gives both its dimensions; a dimension in the middle takes a pass of its own. What
    does not depend on the gradient is settled beforehand: a short backward makes hundreds of calls.
    """

    def __init__(self, sums: Mapping[int, Tensor], shape: Sequence[int], running: Tensor | None) -> None:
        self._sums, self._shape, self._running = sums, shape, running  # kept alive: the passes hold addresses
        self._products = any(len(total) == 3 for total in sums.values())
        last = len(shape) - 1
        self._passes: list[tuple[int, Tensor | None, tuple[int | str, ...]]] = []
        if last in sums or last - 1 in sums or running is not None:
            self._passes.append(self._pass(last - 1, sums.get(last), running))
        self._passes += [self._pass(dim, None, None) for dim in sums if dim < last - 1]

    def _pass(self, dim: int, column_sums: Tensor | None, running: Tensor | None) -> tuple[int, Tensor | None, tuple[int | str, ...]]:
        """Prepare a pass over the matrix [product of dimensions up to `dim`, product of the rest].

        Returns (dim, row sums to fold into those of `dim`, arguments of the native call).
        """
        rows, columns, sums = prod(self._shape[: dim + 1]), prod(self._shape[dim + 1 :]), self._sums.get(dim)
        unfolded = None if sums is None or rows == self._shape[dim] else sums.new_zeros(len(sums), rows)
        addresses = (0 if x is None else x.data_ptr() for x in (running, sums if unfolded is None else unfolded, column_sums))
        return dim, unfolded, (rows, columns, *addresses, THREADS or torch.get_num_threads(), INSTRUCTIONS)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add one gradient. op.py has compared both shapes with the one given at first: C++ takes addresses alone."""
        parameter, gradient = parameter.contiguous(), gradient.contiguous()
        theta = parameter.data_ptr() if self._products else 0
        for dim, unfolded, arguments in self._passes:
            _C.saliency(theta, FORMATS[parameter.dtype], gradient.data_ptr(), FORMATS[gradient.dtype], *arguments)
            if unfolded is not None:
                self._sums[dim].add_(unfolded.view(len(unfolded), -1, self._shape[dim]).sum(1))
                unfolded.zero_()
