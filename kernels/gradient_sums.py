"""Sums of squared gradients and of first-order Taylor terms over all dimensions of a parameter but one, in one pass over both tensors.

For each index i of dimension `dim`, with j the index of all other dimensions:

    sum_j g_ij^2        sum_j |theta_ij g_ij|        sum_j theta_ij g_ij

Accumulated in fp32 (fp64 if an input is fp64). Each program writes the partial sums of one band, and a second stage adds them. There are
no atomics, so results are the same from run to run. Tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100; untested on
a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.gradient_sums_vectors import Vector, add_vectors

__all__ = ["Vector", "add_vectors", "gradient_sums"]

TILE = 1024  # 2048 made ptxas spill a register on sm_100 (Triton 3.9, fp32 rows)
PROGRAMS = 1024


@triton.jit
def partial_sums_kernel(
    param,
    grad,
    partials,
    kept,
    reduced,
    param_kept_stride,
    param_reduced_stride,
    grad_kept_stride,
    grad_reduced_stride,
    ACCUMULATOR: tl.constexpr,
    KEPT: tl.constexpr,
    REDUCED: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write partials [3, bands, kept]. Program (a, b) sums band b, TILES tiles of REDUCED reduced indices, for KEPT kept indices."""
    i = tl.program_id(0).to(tl.int64) * KEPT + tl.arange(0, KEPT)
    first = tl.program_id(1).to(tl.int64) * (TILES * REDUCED)
    squares = tl.zeros((KEPT, REDUCED), ACCUMULATOR)
    absolutes = tl.zeros((KEPT, REDUCED), ACCUMULATOR)
    products = tl.zeros((KEPT, REDUCED), ACCUMULATOR)
    for step in range(0, TILES):
        j = first + step * REDUCED + tl.arange(0, REDUCED)
        inside = (i[:, None] < kept) & (j[None, :] < reduced)
        theta = tl.load(param + i[:, None] * param_kept_stride + j[None, :] * param_reduced_stride, mask=inside, other=0.0).to(ACCUMULATOR)
        g = tl.load(grad + i[:, None] * grad_kept_stride + j[None, :] * grad_reduced_stride, mask=inside, other=0.0).to(ACCUMULATOR)
        product = theta * g
        squares += g * g
        absolutes += tl.abs(product)
        products += product
    bands = tl.num_programs(1).to(tl.int64)
    target = partials + tl.program_id(1).to(tl.int64) * kept + i
    tl.store(target, tl.sum(squares, 1), mask=i < kept)
    tl.store(target + bands * kept, tl.sum(absolutes, 1), mask=i < kept)
    tl.store(target + 2 * bands * kept, tl.sum(products, 1), mask=i < kept)


def tile(kept: int, reduced: int, kept_stride: int, reduced_stride: int) -> tuple[int, int]:
    """Choose (KEPT, REDUCED), whose product is TILE, with the longer side along the contiguous dimension."""
    if reduced_stride <= kept_stride:
        width = min(triton.next_power_of_2(reduced), TILE)
        return TILE // width, width
    width = min(triton.next_power_of_2(kept), TILE // 16)
    return width, TILE // width


def gradient_sums(param: Tensor, grad: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over all dimensions but `dim`: (sum g^2, sum |theta g|, sum theta g), fp32 [param.shape[dim]] each.

    param, grad: one shape, of at least one dimension; any strides; fp32, bf16, fp16 or fp64.
    Matrices are read in place. A tensor of more dimensions is copied first if its other dimensions do not merge into one stride.
    """
    assert param.shape == grad.shape and param.device == grad.device
    kept = param.shape[dim]
    reduced = param.numel() // max(kept, 1)
    if param.numel() == 0:
        return tuple(torch.zeros(3, kept, device=param.device).unbind(0))
    theta, g = (x.detach().movedim(dim, 0).reshape(kept, reduced) for x in (param, grad))
    wide = torch.float64 in (theta.dtype, g.dtype)
    block_kept, block_reduced = tile(kept, reduced, *g.stride())
    blocks = triton.cdiv(kept, block_kept)
    tiles = triton.cdiv(reduced, block_reduced)
    # A power of two, because each value compiles a kernel.
    tiles_per_band = triton.next_power_of_2(triton.cdiv(tiles, max(1, PROGRAMS // blocks)))
    bands = triton.cdiv(tiles, tiles_per_band)
    partials = torch.empty(3, bands, kept, dtype=torch.float64 if wide else torch.float32, device=param.device)
    with torch.cuda.device_of(param):
        partial_sums_kernel[(blocks, bands)](
            theta,
            g,
            partials,
            kept,
            reduced,
            *theta.stride(),
            *g.stride(),
            ACCUMULATOR=tl.float64 if wide else tl.float32,
            KEPT=block_kept,
            REDUCED=block_reduced,
            TILES=tiles_per_band,
        )
    return tuple(partials.sum(1).float().unbind(0))
