"""Cross-entropy of a linear head without storing its logits: the vocabulary is processed in blocks with a running maximum and sum.

    z_v = cap tanh(scale (w_v . h + b_v) / cap)        loss = log sum_v exp z_v - z_target        KL = sum_v p_v (log p_v - log q_v)

Each program processes a block of rows and one share of the vocabulary, and writes maximum, sum and most likely token of the share. A
second stage combines the shares. There are no atomics and shares depend on shapes only, so results are the same from run to run.
Accumulation is fp32, and fp32 inputs are multiplied in full precision (no TF32).
Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867); losses without logits (Wijmans et al., arXiv 2411.09009).
Tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100; untested on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.number_formats import INTERPRETED
from adept_fast.ops.linear_cross_entropy.reference import Projection, RowLosses

PROGRAMS = 1024


class Tile(NamedTuple):
    """The tile that a program multiplies at a time: ROWS x VOCABULARY logits over WIDTH hidden entries, and its launch options."""

    rows: int
    vocabulary: int
    width: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"ROWS": self.rows, "VOCABULARY": self.vocabulary, "WIDTH": self.width}

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def tile(dtype: torch.dtype, divergence: bool = False) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32 if divergence else 64, 16, 4, 2)
    return Tile(64 if divergence else 128, 128, 64, 8, 3)


@triton.jit
def tanh(x):
    # The interpreter does not have libdevice's.
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def dot(a, b, total):
    if INTERPRETED:  # the interpreter would multiply the bits of bf16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def products(hidden, weight, i, v, width, WIDTH: tl.constexpr):
    """Multiply rows i of `hidden` with rows v of `weight`: fp32 [rows, vocabulary]. i, v: within bounds."""
    total = tl.zeros((i.shape[0], v.shape[0]), tl.float32)
    for first in range(0, width, WIDTH):
        k = first + tl.arange(0, WIDTH)
        h = tl.load(hidden + (i[:, None] * width + k[None, :]), mask=k[None, :] < width, other=0.0)
        w = tl.load(weight + (v[:, None] * width + k[None, :]), mask=k[None, :] < width, other=0.0)
        total = dot(h, tl.trans(w), total)
    return total


@triton.jit
def logits(product, bias, v, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    z = product
    if BIAS:
        z += tl.load(bias + v).to(tl.float32)[None, :]
    z *= scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["rows", "base_rows", "blocks"])
def share_kernel(
    hidden,
    weight,
    bias,
    targets,
    maxima,
    sums,
    likeliest,
    wanted,
    weighted,
    rows,
    base_rows,
    width,
    vocabulary,
    blocks,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Process one share of the vocabulary: program (a, b) takes ROWS rows and share b, which is `blocks` blocks of VOCABULARY entries.

    Outputs, fp32 [shares, rows] (likeliest: int64):
    maxima, sums: maximum of z, and sum of exp(z - maximum).
    likeliest: token of the maximum.
    wanted: z_target in the share of the target, 0 in the others; NaN for a target outside the vocabulary.
    weighted: sum of exp(base z - base maximum) * (base z - z). The base of row i is row i % base_rows.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = row < rows - first_row
    i = tl.minimum(row, rows - 1 - first_row).to(tl.int32)
    first = tl.program_id(1).to(tl.int64) * blocks * VOCABULARY
    target = tl.load(targets + first_row + i)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    target_z = tl.where((target >= 0) & (target < vocabulary), 0.0, float("nan"))
    best = tl.zeros((ROWS,), tl.int64)
    base_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    divergence = tl.zeros((ROWS,), tl.float32)
    column = tl.arange(0, VOCABULARY)
    for _ in range(0, blocks):
        left = tl.minimum(vocabulary - first, VOCABULARY).to(tl.int32)
        if left > 0:
            v = tl.minimum(column, left - 1)
            part = weight + first * width
            product = products(hidden + first_row * width, part, i, v, width, WIDTH)
            z = logits(product, bias + first, v, scale, softcap, BIAS, SOFTCAP)
            if DIVERGENCE:
                product = products(hidden, part, (first_row + i) % base_rows, v, width, WIDTH)
                base = logits(product, bias + first, v, scale, softcap, BIAS, SOFTCAP)
                base = tl.where((column < left)[None, :], base, float("-inf"))
                higher = tl.maximum(base_maximum, tl.max(base, 1))
                terms = tl.where((column < left)[None, :], tl.exp(base - higher[:, None]) * (base - z), 0.0)
                divergence = divergence * tl.exp(base_maximum - higher) + tl.sum(terms, 1)
                base_maximum = higher
            z = tl.where((column < left)[None, :], z, float("-inf"))
            hit = tl.minimum(tl.maximum(target - first, -1), VOCABULARY).to(tl.int32)
            target_z += tl.sum(tl.where(column[None, :] == hit[:, None], z, 0.0), 1)
            here = tl.max(z, 1)
            place = tl.min(tl.where(z == here[:, None], column[None, :], VOCABULARY - 1), 1)
            best = tl.where(here > maximum, first + place, best)
            higher = tl.maximum(maximum, here)
            total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
            maximum = higher
        first += VOCABULARY
    at = tl.program_id(1).to(tl.int64) * rows + first_row + row
    tl.store(maxima + at, maximum, mask=inside)
    tl.store(sums + at, total, mask=inside)
    tl.store(likeliest + at, best, mask=inside)
    tl.store(wanted + at, target_z, mask=inside)
    if DIVERGENCE:
        tl.store(weighted + at, divergence, mask=inside)


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """See adept_fast.ops.linear_cross_entropy.reference.

    hidden, head: of one dtype, fp32, bf16 or fp16. A divergence multiplies twice as much, a gradient three times.
    A target outside the vocabulary gives NaN as loss and gradient, because kernels cannot raise.
    Temporary memory: 24 bytes per row and share, at most 3 MiB + 24 bytes per row.
    """
    rows, width = hidden.shape
    vocabulary = len(head.weight)
    hidden, targets = hidden.contiguous(), targets.contiguous()
    head = head._replace(weight=head.weight.contiguous(), bias=None if head.bias is None else head.bias.contiguous())
    weight = head.weight
    chosen = tile(hidden.dtype, variants > 0)
    row_blocks, blocks = triton.cdiv(max(rows, 1), chosen.rows), triton.cdiv(vocabulary, chosen.vocabulary)
    blocks_a_share = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, row_blocks)))
    shares = triton.cdiv(blocks, blocks_a_share)
    maxima, sums, wanted, weighted = (torch.empty(shares, rows, device=hidden.device) for _ in range(4))
    likeliest = torch.empty(shares, rows, dtype=torch.int64, device=hidden.device)
    if rows:
        with torch.cuda.device_of(hidden):
            share_kernel[(row_blocks, shares)](
                hidden,
                weight,
                weight if head.bias is None else head.bias,
                targets,
                maxima,
                sums,
                likeliest,
                wanted,
                weighted,
                rows,
                rows // max(variants, 1),
                width,
                vocabulary,
                blocks_a_share,
                head.scale,
                head.softcap,
                BIAS=head.bias is not None,
                SOFTCAP=head.softcap != 0,
                DIVERGENCE=variants > 0,
                **chosen.sizes,
                **chosen.options,
            )
    maximum, share = maxima.max(0)
    shrink = (maxima - maximum).exp()
    total = (sums * shrink).sum(0)
    normaliser = maximum + total.log()
    kl = normaliser[:0]
    if variants:
        base = torch.arange(rows, device=hidden.device) % (rows // variants)
        kl = (weighted * shrink[:, base]).sum(0) / total[base] - normaliser[base] + normaliser
    losses = normaliser - wanted.sum(0)
    grads = hidden.new_empty(0, width, dtype=torch.float32)
    if gradient:
        from adept_fast.kernels.linear_cross_entropy_gradient import input_gradient

        grads = input_gradient(hidden, head, targets, torch.where(losses.isnan(), losses, normaliser))
    return RowLosses(losses, likeliest.gather(0, share[None])[0], kl, grads)
