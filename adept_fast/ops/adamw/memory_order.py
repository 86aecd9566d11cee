"""How a parameter lies in memory, and how its gradient and state are brought into the same order.

Backends walk memory, not indices: element i of a dense tensor is the i-th in memory, whatever the strides. Index j of a dimension with
stride s and size n is then (i // s) % n, in transposed and channels-last tensors too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def in_one_order(tensors: list[Tensor | None], row_major: bool) -> tuple[list[Tensor | None], list[Pair]]:
    """The tensors, all dense and in the order of dimensions of the first (row-major where asked for), and the pairs (tensor, copy) of
    those that had to be copied."""
    first = tensors[0]
    if all(x is None or x.is_contiguous() for x in tensors):
        return tensors, []
    like = torch.empty(first.shape, device="meta") if row_major else torch.empty_like(first, device="meta")
    ordered, copies = [], []
    for x in tensors:
        if x is not None and x.stride() != like.stride():
            copy = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
            copies.append((x, copy))
            x = copy
        ordered.append(x)
    return ordered, copies


def unit_walk(param: Tensor, multipliers: Tensor, dim: int) -> tuple[int, int] | None:
    """(length, inner) such that element i in memory has the multiplier multipliers.view(-1)[(i // inner) % length], or None where the
    memory order of `param` allows no such walk. `multipliers` covers dimensions dim .. dim + ndim - 1."""
    units = [d for d in range(dim, dim + multipliers.ndim) if param.shape[d] > 1]
    if not units or param.numel() == 0:
        return 1, 1
    merge = all(param.stride(a) == param.stride(b) * param.shape[b] for a, b in pairwise(units))
    return (multipliers.numel(), param.stride(units[-1])) if merge else None
