"""8-bit moments in Triton: the bytes and scales of adept_fast/ops/adamw/eight_bit.py, for tensors [blocks, 64]."""

from __future__ import annotations

import triton
import triton.language as tl

from adept_fast.kernels.number_formats import divided
from adept_fast.ops.adamw.eight_bit import OF_AVERAGE, OF_ROOT

AVERAGE_SHIFT = tl.constexpr(OF_AVERAGE.shift)
AVERAGE_LAST = tl.constexpr(OF_AVERAGE.last)
AVERAGE_LARGEST = tl.constexpr(OF_AVERAGE.largest)
ROOT_SHIFT = tl.constexpr(OF_ROOT.shift)
ROOT_LAST = tl.constexpr(OF_ROOT.last)
ROOT_LEAST = tl.constexpr(OF_ROOT.least)
ROOT_LARGEST = tl.constexpr(OF_ROOT.largest)
ROOT_OFFSET = tl.constexpr(OF_ROOT.offset)
TINY = tl.constexpr(2.0**-100)


@triton.jit
def decoded_size(coded, scale, SHIFT: tl.constexpr):
    return ((0x3C000000 + (coded << SHIFT)).to(tl.float32, bitcast=True) - 0.0078125) * scale[:, None]


@triton.jit
def decoded_average(byte, scale):
    coded = byte.to(tl.uint32) & 127
    bits = decoded_size(coded, scale, AVERAGE_SHIFT).to(tl.uint32, bitcast=True) | ((byte.to(tl.uint32) & 128) << 24)
    return tl.where(coded > AVERAGE_LAST, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def decoded_root(byte, scale):
    coded = byte.to(tl.uint32)
    bits = decoded_size(coded, scale, ROOT_SHIFT).to(tl.uint32, bitcast=True)
    return tl.where(coded > ROOT_LAST, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(bits, LARGEST: tl.constexpr):
    """Return the scale of each block of sizes, given as bits, and the factor that makes shares of sizes. 0x7F800000: infinity."""
    largest = tl.max(tl.where(bits < 0x7F800000, bits, 0).to(tl.int32), axis=1).to(tl.float32, bitcast=True)
    used = largest >= TINY
    last = tl.full(largest.shape, LARGEST, tl.float32)
    divisor = tl.where(used, largest, 1.0)
    return tl.where(used, divided(largest, last), 0.0), tl.where(used, divided(last, divisor), 0.0)


@triton.jit
def coded_size(bits, factor, dither, SHIFT: tl.constexpr, LAST: tl.constexpr):
    share = bits.to(tl.float32, bitcast=True) * factor[:, None]
    coded = ((share + 0.0078125).to(tl.uint32, bitcast=True) - 0x3C000000 + (dither >> (32 - SHIFT))) >> SHIFT
    return share, tl.minimum(coded, LAST)


@triton.jit
def coded_average(m, dither):
    """Return bytes and scales."""
    bits = m.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    scale, factor = block_scale(size, AVERAGE_LARGEST)
    _, coded = coded_size(size, factor, dither, AVERAGE_SHIFT, AVERAGE_LAST)
    return tl.where(size < 0x7F800000, coded | ((bits >> 24) & 128), AVERAGE_LAST + 1).to(tl.uint8), scale


@triton.jit
def coded_root(root, dither):
    size = root.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    scale, factor = block_scale(size, ROOT_LARGEST)
    share, coded = coded_size(size, factor, dither + ROOT_OFFSET, ROOT_SHIFT, ROOT_LAST)
    coded = tl.where((share > 0.0) & (coded < ROOT_LEAST), ROOT_LEAST, coded)
    return tl.where(size < 0x7F800000, coded, ROOT_LAST + 1).to(tl.uint8), scale
