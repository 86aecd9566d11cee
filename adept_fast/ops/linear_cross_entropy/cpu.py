"""Cross-entropy of a linear head on the CPU, through adept_fast._C."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_fast import _C
from adept_fast.ops.linear_cross_entropy.reference import Projection, RowLosses

BLOCK = 1024  # vocabulary entries at a time
CONVERTED = 2**18  # elements of a 16-bit head at a time, in fp32: 1 MiB
AREA = 2**18  # logits at a time: 1 MiB
INSTRUCTIONS = ""  # "avx512", "avx2" or "generic"; "": the best of this CPU
THREADS = 0  # 0: torch.get_num_threads()


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """See adept_fast.ops.linear_cross_entropy.reference. torch multiplies a block; C++ takes its softmax while it is in cache.

    Temporary memory: the rows in fp32, AREA logits, and CONVERTED elements of a 16-bit head in fp32.
    C++ gets addresses only. The tensors are contiguous, and op.py has compared their lengths.
    """
    rows, width = hidden.shape
    if rows and not 0 <= targets.min() <= targets.max() < len(head.weight):
        raise IndexError(f"targets must be from 0 to {len(head.weight) - 1}, found {targets.min()} to {targets.max()}")
    weight, bias = head.weight, None if head.bias is None else head.bias.float().contiguous()
    group = max(variants, 1)
    grouped = hidden.reshape(group, rows // group, width).transpose(0, 1).reshape(rows, width).float().contiguous()
    wanted = targets.view(group, rows // group).T.contiguous()
    length = BLOCK if weight.dtype == torch.float32 else min(BLOCK, max(64, CONVERTED // max(width, 1) // 16 * 16))
    converted = torch.empty(0 if weight.dtype == torch.float32 else length, width)
    at_once = max(1, AREA // length // group) * group
    block = torch.empty(min(at_once, rows), length)
    state = torch.zeros(7, rows, dtype=torch.float64)
    maximum, total, weighted, target, slope, shrink, argmax = state
    maximum.fill_(float("-inf"))
    grads = torch.zeros(rows if gradient else 0, width)
    for first in range(0, len(weight), length):
        part = weight[first : first + length]
        if part.dtype != torch.float32:
            part = converted[: len(part)].copy_(part)
        for row in range(0, rows, at_once):
            some = slice(row, row + at_once)
            z = block[: min(at_once, rows - row), : len(part)]
            torch.mm(grouped[some], part.T, out=z)
            _C.softmax(
                logits=z.data_ptr(),
                rows=len(z),
                count=len(part),
                stride=length,
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
