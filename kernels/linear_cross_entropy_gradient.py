"""Gradient of each row's cross-entropy to its hidden state, with a frozen head, from recomputed blocks of the softmax.

    d loss / d h = sum_v (exp(z_v - log sum_u exp z_u) - [v = target]) scale (1 - (z_v / cap)^2) w_v

For one part of the vocabulary after the other, one kernel writes the factors of w_v in the head's dtype, and another adds their product
with the head's rows in fp32. Each element of the gradient belongs to one program, so there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.linear_cross_entropy import dot, logits, products, tile
from adept_fast.kernels.number_formats import TRITON_DTYPES, rounded
from adept_fast.ops.linear_cross_entropy.reference import Projection

PART = 2**25  # factors in memory at a time


@triton.jit(do_not_specialize=["rows", "first", "count"])
def factors_kernel(
    hidden,
    weight,
    bias,
    targets,
    normaliser,
    factors,
    rows,
    width,
    first,
    count,
    stride,
    scale,
    softcap,
    DTYPE: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write factors [rows, stride] of w_v for v = first, first + 1, ...: 0 after `count` entries. Program (a, b): ROWS x VOCABULARY."""
    first_row, start = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * VOCABULARY
    row, column = tl.arange(0, ROWS), tl.arange(0, VOCABULARY)
    i = tl.minimum(row, rows - 1 - first_row).to(tl.int32)
    at = first.to(tl.int64) + start
    left = count - start  # negative behind the end of the last part, where factors are set to 0
    v = tl.minimum(column, tl.maximum(left - 1, 0))
    at = tl.where(left > 0, at, 0)
    product = products(hidden + first_row * width, weight + at * width, i, v, width, WIDTH)
    z = logits(product, bias + at, v, scale, softcap, BIAS, SOFTCAP)
    hit = tl.minimum(tl.maximum(tl.load(targets + first_row + i) - at, -1), VOCABULARY).to(tl.int32)
    factor = tl.exp(z - tl.load(normaliser + first_row + i)[:, None]) - tl.where(column[None, :] == hit[:, None], 1.0, 0.0)
    if SOFTCAP:
        factor *= 1 - (z / softcap) * (z / softcap)
    factor = tl.where((column < left)[None, :], factor * scale, 0.0)
    stored = rounded(factor, DTYPE)
    # bf16 as uint16, because the interpreter's conversion truncates.
    place = factors.to(tl.pointer_type(stored.dtype)) + first_row * stride + start + (row[:, None] * stride + column[None, :])
    tl.store(place, stored, mask=(row < rows - first_row)[:, None])


@triton.jit(do_not_specialize=["rows", "first", "last"])
def add_product_kernel(
    factors,
    weight,
    gradient,
    rows,
    width,
    first,
    last,
    stride,
    ROWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """gradient += factors @ weight[first:]. Factors after entry `last` are 0. Program (a, b): ROWS rows, VOCABULARY columns."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * VOCABULARY + tl.arange(0, VOCABULARY)
    i = tl.minimum(row, rows - 1 - first_row).to(tl.int32)
    inside = (row < rows - first_row)[:, None] & (column < width)[None, :]
    place = gradient + first_row * width + (row[:, None] * width + column[None, :])
    total = tl.load(place, mask=inside, other=0.0)
    at = tl.arange(0, WIDTH)
    for start in range(0, stride, WIDTH):
        g = tl.load(factors + first_row * stride + start + (i[:, None] * stride + at[None, :]))
        begin = tl.minimum(first + start, last).to(tl.int64)
        v = tl.minimum(at, (last - begin).to(tl.int32))
        w = tl.load(weight + begin * width + (v[:, None] * width + column[None, :]), mask=(column < width)[None, :], other=0.0)
        total = dot(g, w, total)
    tl.store(place, total, mask=inside)


def input_gradient(hidden: Tensor, head: Projection, targets: Tensor, normaliser: Tensor) -> Tensor:
    """Compute the gradient, fp32 [rows, width].

    hidden, head.weight: contiguous, of one dtype. head.bias: contiguous.
    normaliser: log sum_v exp z_v, fp32 [rows].
    Temporary memory: at most PART factors.
    """
    rows, width = hidden.shape
    vocabulary = len(head.weight)
    gradient = torch.zeros(rows, width, device=hidden.device)
    if not rows:
        return gradient
    chosen = tile(hidden.dtype)
    row_blocks, blocks = triton.cdiv(rows, chosen.rows), triton.cdiv(vocabulary, chosen.vocabulary)
    stride = chosen.vocabulary * min(blocks, max(1, PART // rows // chosen.vocabulary))
    factors = torch.empty(rows, stride, dtype=hidden.dtype, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for first in range(0, vocabulary, stride):
            count = min(stride, vocabulary - first)
            factors_kernel[(row_blocks, stride // chosen.vocabulary)](
                hidden,
                head.weight,
                head.weight if head.bias is None else head.bias,
                targets,
                normaliser,
                factors,
                rows,
                width,
                first,
                count,
                stride,
                head.scale,
                head.softcap,
                DTYPE=TRITON_DTYPES[hidden.dtype],
                BIAS=head.bias is not None,
                SOFTCAP=head.softcap != 0,
                **chosen.sizes,
                **chosen.options,
            )
            add_product_kernel[(row_blocks, triton.cdiv(width, chosen.vocabulary))](
                factors, head.weight, gradient, rows, width, first, vocabulary - 1, stride, **chosen.sizes, **chosen.options
            )
    return gradient
