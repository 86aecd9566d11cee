"""Brings the gradient and the state of a parameter into the parameter's memory order.

Backends count elements in memory order: element i of a dense tensor is the i-th in memory, whatever its strides. The index of element i
along a dimension of stride s and size n is (i // s) % n, also in transposed and channels-last tensors.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.runtime.dtensor import Mesh

Pair = tuple[Tensor, Tensor]


class Operands(NamedTuple):
    """A parameter, its gradient and its state in any memory order. Of DTensors: the local parts.

    dim: the first dimension that `multipliers` covers.
    first_index, seed: see Update.
    mesh: the mesh that a DTensor is sharded over.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    step: Tensor
    multipliers: Tensor | None
    dim: int
    first_index: int
    seed: int
    mesh: Mesh | None
    backend: str
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    row: int = 0


def in_memory(given: Operands, options: AdamWOptions) -> tuple[Update, list[Pair]]:
    """Convert to real tensors in one memory order.

    Returns the update, and the pairs (original, copy) of tensors that were copied and must be written back.
    """
    param, grad, multipliers = given.param, given.grad, given.multipliers
    if param.numel() == 0:
        multipliers = None
    walk = None if multipliers is None else unit_walk(param, multipliers, given.dim)
    if grad.is_complex():
        grad = grad.resolve_conj()
    elif grad.dtype == torch.float64 != param.dtype:
        grad = grad.float()  # the arithmetic is fp32
    grad = grad.resolve_neg()
    needed = [param, grad, given.exp_avg, given.exp_avg_sq]
    optional = [x for x in (given.max_exp_avg_sq, given.master) if x is not None]
    ordered, copies = in_one_order([*needed, *optional], row_major=given.row > 0 or (multipliers is not None and walk is None))
    if multipliers is not None and ordered[0] is not param:
        walk = unit_walk(ordered[0], multipliers, given.dim)
    length, inner = walk or (1, 1)
    if param.is_complex():
        ordered = [torch.view_as_real(x) for x in ordered]
        inner *= 2
    if multipliers is not None:
        multipliers = multipliers.reshape(-1).contiguous()
    copies = [(original, copy) for original, copy in copies if original is not grad]
    param, grad, exp_avg, exp_avg_sq, *optional = ordered
    max_exp_avg_sq = None if given.max_exp_avg_sq is None else optional[0]
    master = None if given.master is None else optional[-1]
    update = Update(
        param=param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=max_exp_avg_sq,
        master=master,
        step=given.step,
        multipliers=multipliers,
        length=length,
        inner=inner,
        first_index=given.first_index,
        seed=given.seed,
        options=options,
        exp_avg_scale=given.exp_avg_scale,
        exp_avg_sq_scale=given.exp_avg_sq_scale,
        row=given.row,
    )
    return update, copies


def in_one_order(tensors: list[Tensor], row_major: bool) -> tuple[list[Tensor], list[Pair]]:
    """Copy tensors that are not dense in the memory order of the first one (row_major: in row-major order).

    Returns all tensors, and the pairs (tensor, copy).
    """
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return tensors, []
    like = torch.empty(first.shape, device="meta") if row_major else torch.empty_like(first, device="meta")
    ordered, copies = [], []
    for x in tensors:
        if x.stride() != like.stride():
            copy = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
            copies.append((x, copy))
            x = copy
        ordered.append(x)
    return ordered, copies


def unit_walk(param: Tensor, multipliers: Tensor, dim: int) -> tuple[int, int] | None:
    """Find (length, inner) such that element i in memory has the multiplier multipliers.view(-1)[(i // inner) % length].

    multipliers: covers dimensions dim, dim + 1, ... of `param`.
    Returns None if the memory order of `param` has no such pair.
    """
    units = [d for d in range(dim, dim + multipliers.ndim) if param.shape[d] > 1]
    if not units or param.numel() == 0:
        return 1, 1
    merge = all(param.stride(a) == param.stride(b) * param.shape[b] for a, b in pairwise(units))
    return (multipliers.numel(), param.stride(units[-1])) if merge else None
