"""Losses of a linear head and sums of gradients on the CPU, through adept_fast._C."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from adept_fast import _C
from adept_fast.reference import Projection, RowLosses

BLOCK = 1024  # entries of the vocabulary at once
AREA = 2**18  # logits at once: 1 MiB
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/descriptor.h
INSTRUCTIONS = ""  # the best that the CPU has
THREADS = 0  # torch's


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """See adept_fast.reference: products by torch, their softmax by C++ while they are in cache.

    Beside its results it holds the rows in fp32, AREA logits, and BLOCK rows of a 16-bit head in fp32.
    """
    rows, width = hidden.shape
    weight, bias = head.weight, None if head.bias is None else head.bias.float()
    group = max(variants, 1)
    grouped = hidden.view(group, -1, width).transpose(0, 1).reshape(rows, width).float().contiguous()
    wanted = targets.view(group, -1).T.contiguous()
    at_once = max(1, AREA // BLOCK // group) * group
    block = torch.empty(min(at_once, rows), BLOCK)
    state = torch.zeros(7, rows, dtype=torch.float64)
    maximum, total, weighted, target, slope, shrink, argmax = state
    maximum.fill_(float("-inf"))
    grads = torch.zeros(rows if gradient else 0, width)
    for first in range(0, len(weight), BLOCK):
        part = weight[first : first + BLOCK].float()
        for row in range(0, rows, at_once):
            some = slice(row, row + at_once)
            z = block[: min(at_once, rows - row), : len(part)]
            torch.mm(grouped[some], part.T, out=z)
            _C.softmax(
                logits=z.data_ptr(),
                rows=len(z),
                count=len(part),
                stride=BLOCK,
                first=first,
                targets=wanted.data_ptr() + 8 * row,
                bias=0 if bias is None else bias.data_ptr() + 4 * first,
                scale=head.scale,
                softcap=head.softcap,
                variants=variants,
                gradient=gradient,
                state=state.data_ptr() + 8 * row,
                state_stride=rows,
                threads=THREADS or torch.get_num_threads(),
                set=INSTRUCTIONS,
            )
            if gradient:
                grads[some].mul_(shrink[some, None]).addmm_(z, part)
    normaliser = maximum + total.log()
    losses = (normaliser - target).float()
    kl = losses[:0]
    if variants:
        base = torch.arange(rows) // variants * variants
        kl = (weighted / total[base] - normaliser[base] + normaliser).float().view(-1, variants).T.flatten()
    if gradient:
        grads.div_(total[:, None]).sub_(weight[wanted.flatten()] * slope[:, None])
    return RowLosses(losses.view(-1, group).T.flatten(), argmax.long().view(-1, group).T.flatten(), kl, grads)


def add_saliency(sums: Mapping[int, Tensor], parameter: Tensor, gradient: Tensor, running: Tensor | None) -> None:
    """Add sums of g^2, |theta g| and theta g along dimensions of a gradient to `sums`, and the gradient to `running` (fp32, contiguous).

    sums: dimension -> fp64 [1, indices] (g^2 alone) or [3, indices], contiguous. Both tensors fp32, bf16 or fp16. One pass over the memory
    of a matrix gives both its dimensions; a dimension in the middle takes a pass of its own.
    """
    parameter, gradient = parameter.contiguous(), gradient.contiguous()
    shape, last = gradient.shape, gradient.ndim - 1

    def matrix(dim: int, column_sums: Tensor | None, kept: Tensor | None) -> None:
        """One pass over [product of the dimensions up to `dim`, product of those behind it]."""
        columns = prod(shape[dim + 1 :])
        rows = prod(shape[: dim + 1])
        row_sums = None
        if dim in sums:
            row_sums = sums[dim] if rows == shape[dim] else sums[dim].new_zeros(len(sums[dim]), rows)
        _C.saliency(
            param=parameter.data_ptr() if products else 0,
            param_format=FORMATS[parameter.dtype],
            grad=gradient.data_ptr(),
            grad_format=FORMATS[gradient.dtype],
            rows=rows,
            columns=columns,
            running=0 if kept is None else kept.data_ptr(),
            row_sums=0 if row_sums is None else row_sums.data_ptr(),
            column_sums=0 if column_sums is None else column_sums.data_ptr(),
            threads=THREADS or torch.get_num_threads(),
            set=INSTRUCTIONS,
        )
        if row_sums is not None and row_sums is not sums[dim]:
            sums[dim].add_(row_sums.view(len(row_sums), -1, shape[dim]).sum(1))

    products = any(len(total) == 3 for total in sums.values())
    if last in sums or last - 1 in sums or running is not None:
        matrix(last - 1, sums.get(last), running)
    for dim in sums:
        if dim < last - 1:
            matrix(dim, None, None)
