"""Elements in memory as fp32: loads, stores and roundings that give the same bits compiled and in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}


@triton.jit
def is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


INTERPRETED = tl.constexpr(not isinstance(is_finite, triton.JITFunction))
# Triton's own division and square root flush denormals. The interpreter does not, and has no PTX.
PTX = tl.constexpr(isinstance(is_finite, triton.JITFunction) and torch.version.hip is None)


@triton.jit
def pointers(address, first, offset, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    # bf16 as uint16, because the interpreter's conversion truncates.
    start = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE)) + first
    if WHOLE:
        # The compiler does not know the alignment of an address from a table. Without it, it loads one element at a time.
        start = tl.multiple_of(start, 16)
    return start + offset


@triton.jit
def read(address, span, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Load elements as stored, bf16 as uint16.

    span: the elements (first + offset, and whether each is inside) as (first, offset, inside).
    WHOLE: all are inside, and the first one is aligned to 16 bytes.
    """
    first, offset, inside = span
    place = pointers(address, first, offset, DTYPE, WHOLE)
    return tl.load(place) if WHOLE else tl.load(place, mask=inside, other=0)


@triton.jit
def write(address, span, stored, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    first, offset, inside = span
    place = pointers(address, first, offset, DTYPE, WHOLE)
    if WHOLE:
        tl.store(place, stored)
    else:
        tl.store(place, stored, mask=inside)


@triton.jit
def widened(stored, DTYPE: tl.constexpr):
    """Convert elements as stored to fp32."""
    if DTYPE == tl.bfloat16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round fp32 to nearest even, as stored."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, nearest).to(tl.uint16)
    else:
        return x.to(DTYPE)


@triton.jit
def divided(x, y):
    if PTX:
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    if PTX:
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt_rn(x)
