"""Losses of a linear head on the CPU: products by torch, their running softmax by adept_fast._C while they are in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_fast import _C
from adept_fast.reference import Projection, RowLosses

BLOCK = 1024  # entries of the vocabulary at once
AREA = 2**18  # logits at once: 1 MiB
INSTRUCTIONS = ""  # the best that the CPU has
THREADS = 0  # torch's


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """See adept_fast.reference. Beside its results it holds the rows in fp32, AREA logits, and BLOCK rows of a 16-bit head in fp32."""
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
