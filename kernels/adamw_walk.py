"""Walks along a tensor's units and rows: divides once per program, and then moves along without 64-bit divisions, which are slow."""

from __future__ import annotations

import triton
import triton.language as tl

from adept_fast.ops.adamw import eight_bit

CODED = tl.constexpr(eight_bit.BLOCK)  # elements of a block of 8-bit moments


@triton.jit
def quotient(offset, divisor, BLOCK: tl.constexpr):
    """Compute max(offset, 0) // divisor without a division per element. Exact for offset < 2 BLOCK, divisor <= BLOCK <= 1024."""
    reciprocal = ((2097152 + divisor - 1) // divisor).to(tl.uint32)
    return ((tl.maximum(offset, 0).to(tl.uint32) * reciprocal) >> 21).to(tl.int32)


@triton.jit
def units_on(elements, place, inner, BLOCK: tl.constexpr):
    """Count unit boundaries in the next `elements` (<= BLOCK) elements. place: position in the current unit, of `inner` elements."""
    # Of a unit longer than BLOCK at most one end is near: only its last BLOCK elements count.
    short = tl.minimum(inner, BLOCK)
    before_end = tl.maximum(place - (inner - short), -BLOCK).to(tl.int32)
    return quotient(before_end + elements, short.to(tl.int32), BLOCK)


@triton.jit
def unit_rates(multipliers, position, offset, group, BLOCK: tl.constexpr):
    """Return decay and stride (see update_block) of the elements `offset`, all below BLOCK.

    position: unit, place in it, number and size of units. group: lr, weight_decay, correction.
    """
    unit, place, length, inner = position
    lr, weight_decay, correction = group
    rates = multipliers.to(tl.pointer_type(tl.float32)) + unit
    if (length == 1) | (units_on(BLOCK - 1, place, inner, BLOCK) == 0):
        rate = tl.load(rates, mask=multipliers != 0, other=1.0)
        decay = tl.full(offset.shape, tl.where(rate == 0.0, -1.0, (lr * rate.to(tl.float64) * weight_decay).to(tl.float32)), tl.float32)
        stride = tl.full(offset.shape, (lr * rate.to(tl.float64) * correction).to(tl.float32), tl.float32)
    else:
        further = units_on(offset, place, inner, BLOCK)
        around = units_on(further, unit, length, BLOCK)
        each = tl.load(rates + (further - around * length))
        decay = tl.where(each == 0.0, -1.0, (lr * each.to(tl.float64) * weight_decay).to(tl.float32))
        stride = (lr * each.to(tl.float64) * correction).to(tl.float32)
    return decay, stride


@triton.jit
def next_blocks(count, column, row, BLOCK: tl.constexpr):
    """Find the `count`-th (<= BLOCK) next blocks of 8-bit moments. column: of the current block in its row, of `row` elements.

    Returns the elements between both blocks' beginnings, and the found blocks' columns.
    """
    blocks = (row + CODED - 1) // CODED
    rows = units_on(count, column, blocks, BLOCK)
    found = column + count - rows * blocks
    return rows * row + (found - column) * CODED, found
