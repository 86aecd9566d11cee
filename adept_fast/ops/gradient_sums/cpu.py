"""Sums of gradients on the CPU, through adept_fast._C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

import adept_fast._C as _C
from adept_fast.ops.number_formats import FORMATS

INSTRUCTIONS = ""  # "avx512", "avx2" or "generic"; "": the best of this CPU
THREADS = 0  # 0: torch.get_num_threads()


def gradient_sums(parameter: Tensor, gradient: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """See adept_fast.ops.gradient_sums.reference. Takes fp32, bf16 and fp16."""
    sums = torch.zeros(3, parameter.shape[dim], dtype=torch.float64)
    NativeGradientSums({dim % parameter.ndim: sums}, parameter.shape, None).add(parameter.detach(), gradient.detach())
    squares, magnitudes, products = sums.float().unbind(0)
    return squares, magnitudes, products


class NativeGradientSums:
    """Accumulates a parameter's gradients into `sums` and `running`.

    sums: dimension -> fp64, contiguous, [1, indices] for sum g^2, or [3, indices] for sum g^2, sum |theta g| and sum theta g.
    shape: of the parameter.
    running: fp32, contiguous, of that shape, or None. Gradients are added to it.

    One pass over a matrix gives the sums of both dimensions; of more dimensions, each but the last two takes a pass of its own.
    The arguments of the native calls are prepared once, because a short backward makes hundreds of calls.
    """

    def __init__(self, sums: Mapping[int, Tensor], shape: Sequence[int], running: Tensor | None) -> None:
        self._sums, self._shape, self._running = sums, shape, running  # referenced, as the passes hold addresses
        self._products = any(len(total) == 3 for total in sums.values())
        last = len(shape) - 1
        self._passes: list[tuple[int, Tensor | None, tuple[int | str, ...]]] = []
        if last in sums or last - 1 in sums or running is not None:
            self._passes.append(self._pass(last - 1, sums.get(last), running))
        self._passes += [self._pass(dim, None, None) for dim in sums if dim < last - 1]

    def _pass(self, dim: int, column_sums: Tensor | None, running: Tensor | None) -> tuple[int, Tensor | None, tuple[int | str, ...]]:
        """Prepare a pass over the matrix [product of the sizes up to `dim`, product of the rest].

        Returns (dim, row sums that `add` reduces to the indices of `dim` or None, arguments of the native call).
        """
        rows, columns, sums = prod(self._shape[: dim + 1]), prod(self._shape[dim + 1 :]), self._sums.get(dim)
        partial = None if sums is None or rows == self._shape[dim] else sums.new_zeros(len(sums), rows)
        addresses = (0 if x is None else x.data_ptr() for x in (running, sums if partial is None else partial, column_sums))
        return dim, partial, (rows, columns, *addresses, THREADS or torch.get_num_threads(), INSTRUCTIONS)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add one gradient. The caller (op.py) has compared both shapes with `shape`, as C++ gets addresses only."""
        parameter, gradient = parameter.contiguous(), gradient.contiguous()
        theta = parameter.data_ptr() if self._products else 0
        for dim, partial, arguments in self._passes:
            _C.saliency(theta, FORMATS[parameter.dtype], gradient.data_ptr(), FORMATS[gradient.dtype], *arguments)
            if partial is not None:
                self._sums[dim].add_(partial.view(len(partial), -1, self._shape[dim]).sum(1))
                partial.zero_()
