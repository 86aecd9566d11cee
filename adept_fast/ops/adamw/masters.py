"""Weights of bf16 and fp16 parameters in fp32: read from parameter and master, and rounded to them."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_fast.ops.adamw.eight_bit import dither_of, mix

DITHER_OFFSET = 0xDAA66D2B  # so that a master and its moments are not rounded alike


def needs_master(param: Tensor) -> bool:
    """Whether `param` is bf16 or fp16."""
    return param.is_floating_point() and param.dtype.itemsize < 4


def read_weight(mode: str | None, param: Tensor, master: Tensor | None) -> Tensor:
    weight = param if param.dtype == torch.float64 else param.float()
    if mode not in ("copy", "remainder", "remainder8", "kahan"):
        return weight
    assert master is not None
    if mode == "copy":
        return torch.where(master.to(param.dtype) == param, master, weight)
    if mode == "remainder":
        return join_master(param, master)
    if mode == "remainder8":
        return join_master(param, master.to(torch.int32) << 8)
    return weight + master


def round_weight(
    mode: str | None, weight: Tensor, dtype: torch.dtype, seed: int, step: float | Tensor, first_index: int
) -> tuple[Tensor, Tensor | None]:
    if mode == "remainder":
        return split_master(weight)
    if mode == "remainder8":
        dither = dither_of(weight.shape, seed, step, first_index, weight.device) + DITHER_OFFSET
        return split_master8(weight, (dither & 0xFFFFFFFF) >> 24)
    if mode == "stochastic":
        return stochastic_round(weight, seed, step, first_index), None
    rounded = weight.to(dtype)
    if mode == "kahan":
        return rounded, torch.where(weight.isfinite(), weight - rounded, 0)
    return rounded, weight if mode == "copy" else None


def split_master(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 exactly into (nearest bf16, int16 remainder). join_master restores the bits, except for the payload of a NaN.

    With X the fp32 bits: remainder = the low 16 bits of X as a signed number, bf16 bits = (X - remainder) / 2^16. A tie rounds away from
    zero, because rounding to even could need a remainder of +32768, which int16 does not have.
    """
    bits = weight.view(torch.int32)
    remainder = bits.to(torch.int16)
    number = weight.isfinite()
    return torch.where(number, (bits - remainder).view(torch.float32), weight).to(torch.bfloat16), torch.where(number, remainder, 0)


def split_master8(weight: Tensor, dither: Tensor | int = 0x80) -> tuple[Tensor, Tensor]:
    """Split fp32, rounded to its upper 24 bits, into (nearest bf16, int8 remainder). A remainder times 2^8 is that of split_master.

    dither: what is added to the 8 bits that are cut off, 0 ... 255; 0x80: rounds to nearest. A step takes that of 8-bit moments: with
    nearest rounding a weight would stay where it is under updates of less than half a unit.
    """
    bits = weight.view(torch.int32)
    upper = (bits + dither).to(torch.int32) >> 8
    remainder = upper.to(torch.int8)
    number = weight.isfinite()
    high = ((upper - remainder) << 8).view(torch.float32)
    return torch.where(number, high, weight).to(torch.bfloat16), torch.where(number, remainder, 0)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Join (bf16, int16 remainder) to the fp32 weight with bits 2^16 * bf16 bits + remainder: the inverse of split_master.

    Where those bits are NaN, it is the parameter itself: it was set to 0 through `.data`, and its remainder is negative.
    """
    joined = ((param.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)
    return torch.where(joined.isnan(), param.float(), joined)


def stochastic_round(weight: Tensor, seed: int, step: float | Tensor, first_index: int = 0) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that make the expectation exact. bf16 values, infinities and NaN stay.

    Adds r to the low 16 bits of the fp32 pattern and truncates. r is the top 16 bits of a hash of (seed, step, element index), with all
    arithmetic modulo 2^32 and mix(x) = x ^= x >> 16; x *= 0x21f0aaad; x ^= x >> 15; x *= 0x735a2d97; x ^= x >> 15:

        key = mix(mix(seed + 0x9e3779b9) ^ step)        r = mix(mix(low32(index) ^ key) + high32(index) + mix(key + 0x9e3779b9)) >> 16

    index: the element's number in row-major order, from `first_index`.
    """
    step = torch.as_tensor(step).to(weight.device, torch.int64)
    key = mix(mix(torch.full_like(step, (seed + _GOLDEN) & _LOW)) ^ (step & _LOW))
    index = torch.arange(first_index, first_index + weight.numel(), device=weight.device).view(weight.shape)
    noise = mix((mix((index & _LOW) ^ key) + (index >> 32) + mix((key + _GOLDEN) & _LOW)) & _LOW) >> 16
    bits = (weight.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(weight.isfinite(), bits.view(torch.float32), weight).to(torch.bfloat16)


_LOW, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9
