"""8-bit moments: a byte per element, and one fp32 scale per block of 64 elements in a row.

A row is the shortest run of last dimensions, without the first one, that has at least 64 elements. Blocks begin anew in each row, so that
parts of a tensor which keep rows whole (FSDP's shards, experts, units of rows) have the bytes that the whole tensor has.

    exp_avg       sign, and 7 bits: code c of |exp_avg|         exp_avg_sq    8 bits: code c of root = sqrt(exp_avg_sq)
    value         size(c) scale       size(c) = float(bits(1/128) + c 2^shift) - 1/128        shift = 19 for exp_avg, 18 for root

size is linear near 0 and then has 16 (32) values per octave, over 8 octaves: a code takes an addition, a subtraction and a shift. The
block's largest value has the last code but one, the last code is NaN: infinite moments become NaN, and a NaN spoils no other element.
A positive root has at least code 2, so that no update divides by almost 0.

A value between two codes is rounded up with a probability that makes the mean exact, else an average would stay where it is: with beta2 =
0.999 it moves by less than half a code per step. The dither of an element walks through all fractions evenly (golden ratio), which adds
half of the noise that random numbers would.

Source: block-wise codes, Dettmers et al., arXiv 2110.02861; codes by companding of m and sqrt(v), arXiv 2602.23349. Measured in
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
SHORTEST_ROW = 16  # scales of shorter rows take more memory than the codes save


class Code(NamedTuple):
    """shift: see above. last: the largest code of a number. offset: of the dither, so that both moments are not rounded alike."""

    shift: int
    last: int
    least: int
    offset: int

    @property
    def largest(self) -> float:
        return float(_size(torch.tensor(self.last), self.shift))


OF_AVERAGE, OF_ROOT = Code(shift=19, last=126, least=0, offset=0), Code(shift=18, last=254, least=2, offset=0x54858409)
_BASE, _BASE_BITS, _LOW = 1 / 128, 0x3C000000, 0xFFFFFFFF
_PER_STEP, _PER_ELEMENT = 0x9E3779B9, 0x6A09E667  # fractions of the golden ratio and of the square root of 2
_TINY = 2.0**-100


def row_dimension(shape: Sequence[int]) -> int | None:
    """Return the first dimension of a row of a tensor; None if it has no rows that are long enough for 8-bit moments."""
    for dim in range(len(shape) - 1, 0, -1):
        elements = prod(shape[dim:])
        if elements >= BLOCK or dim == 1:
            return dim if elements >= SHORTEST_ROW else None
    return None


def row_length(shape: Sequence[int]) -> int:
    return prod(shape[row_dimension(shape) :])


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor that has rows: its dimensions before the row, and the row's blocks."""
    dim = row_dimension(shape)
    return (*shape[:dim], -(-prod(shape[dim:]) // BLOCK))


def scale_count(numel: int, row: int) -> int:
    return numel // row * -(-row // BLOCK)


def decode(exp_avg: Tensor, exp_avg_scale: Tensor, exp_avg_sq: Tensor, exp_avg_sq_scale: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Return exp_avg and exp_avg_sq as fp32.

    exp_avg, exp_avg_sq: bytes, of one shape. exp_avg_scale, exp_avg_sq_scale: fp32, one per block. row: elements of a row.
    """
    size = exp_avg.to(torch.int32) & 127
    m = torch.where(size > OF_AVERAGE.last, torch.nan, _size(size, OF_AVERAGE.shift) * _spread(exp_avg_scale, row).reshape(exp_avg.shape))
    root = _size(exp_avg_sq.to(torch.int32), OF_ROOT.shift) * _spread(exp_avg_sq_scale, row).reshape(exp_avg.shape)
    return torch.where(exp_avg > 127, -m, m), torch.where(exp_avg_sq > OF_ROOT.last, torch.nan, root * root)


def encode(exp_avg: Tensor, exp_avg_sq: Tensor, row: int, dither: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return bytes and scales [rows, blocks] of exp_avg, then of exp_avg_sq, both fp32.

    dither: int64, of the shape of exp_avg: see dither_of. None: round to nearest.
    """
    codes, scales = _encode(exp_avg.abs(), OF_AVERAGE, row, dither)
    signs = (exp_avg.signbit() & exp_avg.isfinite()).to(torch.uint8) << 7
    return codes | signs, scales, *_encode(exp_avg_sq.double().sqrt().float(), OF_ROOT, row, dither)


def dither_of(shape: Sequence[int], seed: int, step: float | Tensor, first_index: int, device: torch.device) -> Tensor:
    """Return 32 bits for each element: mix(seed + PER_STEP) + step PER_STEP + index PER_ELEMENT, modulo 2^32.

    index: the element's number in row-major order, from `first_index`.
    """
    step = torch.as_tensor(step).to(device, torch.int64)
    index = torch.arange(first_index, first_index + prod(shape), device=device).view(tuple(shape)) & _LOW
    key = mix(torch.full_like(step, (seed + _PER_STEP) & _LOW)) + step * _PER_STEP
    return (key + index * _PER_ELEMENT) & _LOW


def mix(x: Tensor) -> Tensor:
    """Hash 32-bit values in int64: two rounds with the constants of hash-prospector, both below 2^31, so that no product overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def _size(code: Tensor, shift: int) -> Tensor:
    return (_BASE_BITS + (code.to(torch.int32) << shift)).view(torch.float32) - _BASE


def _encode(values: Tensor, code: Code, row: int, dither: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks = _blocks(values, row)
    largest = torch.where(blocks.isfinite(), blocks, 0).amax(-1, keepdim=True)
    used, last = largest >= _TINY, torch.full_like(largest, code.largest)  # torch would multiply by the inverse of a number
    scales = torch.where(used, largest / last, 0)
    shares = blocks * torch.where(used, last / largest, 0)
    between = 1 << (code.shift - 1) if dither is None else ((_blocks(dither, row) + code.offset) & _LOW) >> (32 - code.shift)
    codes = ((shares + _BASE).view(torch.int32).to(torch.int64) - _BASE_BITS + between) >> code.shift
    codes = torch.where(shares > 0, codes.clamp(code.least, code.last), codes)
    codes = torch.where(blocks.isfinite(), codes, code.last + 1)
    return codes.flatten(1)[:, :row].reshape(values.shape).to(torch.uint8), scales.squeeze(-1)


def _blocks(x: Tensor, row: int) -> Tensor:
    """[rows, blocks, BLOCK], filled up with zeros."""
    rows = torch.nn.functional.pad(x.reshape(-1, row), (0, -row % BLOCK))
    return rows.view(-1, rows.shape[1] // BLOCK, BLOCK)


def _spread(scale: Tensor, row: int) -> Tensor:
    """One scale per element: [rows, row]."""
    return scale.reshape(-1, -(-row // BLOCK)).repeat_interleave(BLOCK, dim=1)[:, :row]
