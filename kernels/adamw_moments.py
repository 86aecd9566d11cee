"""The moments of AdamW: exp_avg, exp_avg_sq and max_exp_avg_sq as numbers, or exp_avg and exp_avg_sq in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from adept_fast.kernels.adamw_eight_bit import coded_average, coded_root, decoded_average, decoded_root
from adept_fast.kernels.number_formats import read, rounded, square_root, widened, write


@triton.jit
def average(old, value, weight, slow):
    """Move from the old value by `weight` if slow, else from the new one."""
    start = tl.where(slow, old, value)
    return start + weight * (tl.where(slow, value, old) - start)


@triton.jit
def update_moments(addresses, span, grad, scalar, MOMENTS: tl.constexpr, AMSGRAD: tl.constexpr, WHOLE: tl.constexpr):
    """Return exp_avg, and the square root of the second moment."""
    exp_avg, exp_avg_sq, max_exp_avg_sq = addresses
    weight1, weight2, slow1, slow2 = scalar
    m = widened(read(exp_avg, span, MOMENTS, WHOLE), MOMENTS)
    v = widened(read(exp_avg_sq, span, MOMENTS, WHOLE), MOMENTS)
    m = average(m, grad, weight1, slow1)
    v = average(v, grad * grad, weight2, slow2)
    second = v
    if AMSGRAD:
        largest = widened(read(max_exp_avg_sq, span, MOMENTS, WHOLE), MOMENTS)
        second = tl.where((largest > v) | (largest != largest), largest, v)
        write(max_exp_avg_sq, span, rounded(second, MOMENTS), MOMENTS, WHOLE)
    write(exp_avg, span, rounded(m, MOMENTS), MOMENTS, WHOLE)
    write(exp_avg_sq, span, rounded(v, MOMENTS), MOMENTS, WHOLE)
    return m, square_root(second)


@triton.jit
def update_coded_moments(addresses, span, scales, present, grad, scalar, dither, WHOLE: tl.constexpr):
    """The same for 8-bit moments of whole blocks.

    scales: addresses of the blocks' scales of exp_avg and exp_avg_sq.
    present: which blocks there are; None: all.
    """
    exp_avg, exp_avg_sq, _ = addresses
    weight1, weight2, slow1, slow2 = scalar
    average_scale, root_scale = scales
    m = decoded_average(read(exp_avg, span, tl.uint8, WHOLE), tl.load(average_scale, mask=present))
    root = decoded_root(read(exp_avg_sq, span, tl.uint8, WHOLE), tl.load(root_scale, mask=present))
    m = average(m, grad, weight1, slow1)
    root = square_root(average(root * root, grad * grad, weight2, slow2))
    byte, scale = coded_average(m, dither)
    write(exp_avg, span, byte, tl.uint8, WHOLE)
    tl.store(average_scale, scale, mask=present)
    byte, scale = coded_root(root, dither)
    write(exp_avg_sq, span, byte, tl.uint8, WHOLE)
    tl.store(root_scale, scale, mask=present)
    return m, root
