"""AdamW for a list of tensors: one launch increments the steps and computes scalars, then one launch per combination of dtypes updates.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
    w <- w - (rate weight_decay w + rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t)))
    rate = lr * multiplier

The operations and their order are those of csrc/adamw.h, each rounded once: fp32, with scalars and unit rates in fp64 until their last
rounding. All backends give the same bits, except for the payloads of NaN. A multiplier of 0 writes the old bits of parameter and master.

A table on the device has the addresses of the tensors, and a second one the tensor of each program (adamw_tables.py). Tested in Triton's
interpreter and compiled for sm_80, sm_90 and sm_100; untested on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.adamw_scalars import (
    CORRECTION,
    EPSILON,
    GRAD_SCALE,
    KEY_HIGH,
    KEY_LOW,
    RATE,
    ROW,
    SCALARS,
    SLOW1,
    SLOW2,
    UPDATES,
    WEIGHT1,
    WEIGHT2,
    WEIGHT_DECAY,
    mix,
    prepare_kernel,
)
from adept_fast.kernels.adamw_tables import by_setup, chunks_on, groups_on, tensors_on
from adept_fast.kernels.number_formats import TRITON_DTYPES, divided, is_finite, read, rounded, square_root, widened, write
from adept_fast.ops.adamw.descriptors import WORD, WORDS
from adept_fast.ops.adamw.table import Table
from adept_fast.ops.number_formats import MODES

BLOCK = 1024  # elements at a time; `quotient` is exact up to 1024
BLOCKS = 8  # consecutive blocks of one program
TENSORS = 64  # tensors of one program of prepare_kernel
COPY = tl.constexpr(MODES["copy"])
REMAINDER = tl.constexpr(MODES["remainder"])
KAHAN = tl.constexpr(MODES["kahan"])
STOCHASTIC = tl.constexpr(MODES["stochastic"])
PARAM_WORD = tl.constexpr(WORD.param)
GRAD_WORD = tl.constexpr(WORD.grad)
EXP_AVG_WORD = tl.constexpr(WORD.exp_avg)
EXP_AVG_SQ_WORD = tl.constexpr(WORD.exp_avg_sq)
MAX_EXP_AVG_SQ_WORD = tl.constexpr(WORD.max_exp_avg_sq)
MASTER_WORD = tl.constexpr(WORD.master)
MULTIPLIERS_WORD = tl.constexpr(WORD.multipliers)
NUMEL_WORD = tl.constexpr(WORD.numel)
LENGTH_WORD = tl.constexpr(WORD.length)
INNER_WORD = tl.constexpr(WORD.inner)
FIRST_INDEX_WORD = tl.constexpr(WORD.first_index)


@triton.jit
def average(old, value, weight, slow):
    """Move from the old value by `weight` if slow, else from the new one."""
    start = tl.where(slow, old, value)
    return start + weight * (tl.where(slow, value, old) - start)


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
    return quotient(elements + before_end, short.to(tl.int32), BLOCK)


@triton.jit
def update_block(
    addresses,
    first,
    left,
    index,
    decay,
    stride,
    scalar,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    MODE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update `left` elements from `first` on.

    decay: rate * weight_decay, or -1 for frozen elements.
    stride: factor of m / (sqrt(v) + epsilon).
    """
    param_address, grad_address, exp_avg, exp_avg_sq, max_exp_avg_sq, master_address = addresses
    grad_scale, epsilon, weight1, weight2, slow1, slow2, key_low, key_high = scalar
    inside = tl.arange(0, BLOCK) < left
    grad = widened(read(grad_address, first, inside, GRAD, BLOCK, WHOLE), GRAD) * grad_scale
    m = widened(read(exp_avg, first, inside, MOMENTS, BLOCK, WHOLE), MOMENTS)
    v = widened(read(exp_avg_sq, first, inside, MOMENTS, BLOCK, WHOLE), MOMENTS)
    param = read(param_address, first, inside, PARAM, BLOCK, WHOLE)
    MASTER: tl.constexpr = tl.float32 if MODE == COPY else tl.int16 if MODE == REMAINDER else PARAM
    m = average(m, grad, weight1, slow1)
    v = average(v, grad * grad, weight2, slow2)
    second = v
    if AMSGRAD:
        largest = widened(read(max_exp_avg_sq, first, inside, MOMENTS, BLOCK, WHOLE), MOMENTS)
        second = tl.where((largest > v) | (largest != largest), largest, v)
        write(max_exp_avg_sq, first, inside, rounded(second, MOMENTS), MOMENTS, BLOCK, WHOLE)
    write(exp_avg, first, inside, rounded(m, MOMENTS), MOMENTS, BLOCK, WHOLE)
    write(exp_avg_sq, first, inside, rounded(v, MOMENTS), MOMENTS, BLOCK, WHOLE)
    weight = widened(param, PARAM)
    if (MODE == COPY) | (MODE == REMAINDER) | (MODE == KAHAN):
        master = read(master_address, first, inside, MASTER, BLOCK, WHOLE)
        if MODE == COPY:
            weight = tl.where(widened(rounded(master, PARAM), PARAM) == weight, master, weight)
        elif MODE == REMAINDER:
            joined = ((param.to(tl.int32) << 16) + master.to(tl.int32)).to(tl.float32, bitcast=True)
            weight = tl.where(joined != joined, weight, joined)  # NaN: the parameter was set to 0 through .data
        else:
            weight = weight + widened(master, PARAM)
    change = stride * divided(m, square_root(second) + epsilon)
    # An infinite weight does not decay: inf - inf is no number.
    weight = weight - (tl.where(is_finite(weight), decay * weight, 0.0) + change)
    frozen = decay < 0.0
    bits = weight.to(tl.uint32, bitcast=True)
    if MODE == REMAINDER:
        # A tie rounds away from zero, as the remainder of a tie to even may not fit 16 bits.
        low = tl.where(is_finite(weight), bits.to(tl.int16), 0)
        new = tl.where(is_finite(weight), ((bits - low.to(tl.int32).to(tl.uint32)) >> 16).to(tl.uint16), rounded(weight, PARAM))
        write(master_address, first, inside, tl.where(frozen, master, low), MASTER, BLOCK, WHOLE)
    elif MODE == STOCHASTIC:
        i = (index + tl.arange(0, BLOCK)).to(tl.uint64)
        noise = mix(mix(i.to(tl.uint32) ^ key_low) + (i >> 32).to(tl.uint32) + key_high) >> 16
        new = tl.where(is_finite(weight), ((bits + noise) >> 16).to(tl.uint16), rounded(weight, PARAM))
    else:
        new = rounded(weight, PARAM)
        if MODE == COPY:
            write(master_address, first, inside, tl.where(frozen, master, weight), MASTER, BLOCK, WHOLE)
        elif MODE == KAHAN:
            lost = rounded(tl.where(is_finite(weight), weight - widened(new, PARAM), 0.0), PARAM)
            write(master_address, first, inside, tl.where(frozen, master, lost), MASTER, BLOCK, WHOLE)
    write(param_address, first, inside, tl.where(frozen, param, new), PARAM, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["first_program"])
def update_kernel(
    rows,
    chunks,
    scalars,
    first_program,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    MODE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Update BLOCKS blocks of one tensor. chunks: the tensor of each program, and its part of the tensor."""
    program = first_program + tl.program_id(0).to(tl.int64)
    chunk = tl.load(chunks + program)
    tensor = chunk & 0xFFFFFFFF
    first = (chunk >> 32) * (BLOCK * BLOCKS)
    row = rows + tensor * ROW
    s = scalars + tensor * SCALARS
    if tl.load(s + UPDATES) != 0.0:
        lr = tl.load(s + RATE)
        weight_decay = tl.load(s + WEIGHT_DECAY)
        correction = tl.load(s + CORRECTION)
        scalar = (
            tl.load(s + GRAD_SCALE).to(tl.float32),
            tl.load(s + EPSILON).to(tl.float32),
            tl.load(s + WEIGHT1).to(tl.float32),
            tl.load(s + WEIGHT2).to(tl.float32),
            tl.load(s + SLOW1) != 0.0,
            tl.load(s + SLOW2) != 0.0,
            tl.load(s + KEY_LOW).to(tl.uint32),
            tl.load(s + KEY_HIGH).to(tl.uint32),
        )
        param = tl.load(row + PARAM_WORD)
        grad = tl.load(row + GRAD_WORD)
        exp_avg = tl.load(row + EXP_AVG_WORD)
        exp_avg_sq = tl.load(row + EXP_AVG_SQ_WORD)
        max_exp_avg_sq = tl.load(row + MAX_EXP_AVG_SQ_WORD)
        master = tl.load(row + MASTER_WORD)
        addresses = (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master)
        multipliers = tl.load(row + MULTIPLIERS_WORD)
        numel = tl.load(row + NUMEL_WORD)
        length = tl.load(row + LENGTH_WORD)
        inner = tl.load(row + INNER_WORD)
        first_index = tl.load(row + FIRST_INDEX_WORD)
        aligned = ((param | grad | exp_avg | exp_avg_sq | max_exp_avg_sq | master) & 15) == 0
        # 64-bit division is slow. Divide once, then move unit and place along.
        unit = first // inner
        place = first - unit * inner
        unit = unit % length
        for _ in range(0, BLOCKS):
            rates = multipliers.to(tl.pointer_type(tl.float32)) + unit
            if (length == 1) | (units_on(BLOCK - 1, place, inner, BLOCK) == 0):
                rate = tl.load(rates, mask=multipliers != 0, other=1.0)
                decay = tl.full([BLOCK], tl.where(rate == 0.0, -1.0, (lr * rate.to(tl.float64) * weight_decay).to(tl.float32)), tl.float32)
                stride = tl.full([BLOCK], (lr * rate.to(tl.float64) * correction).to(tl.float32), tl.float32)
            else:
                further = units_on(tl.arange(0, BLOCK), place, inner, BLOCK)
                around = units_on(further, unit, length, BLOCK)
                each = tl.load(rates + (further - around * length))
                decay = tl.where(each == 0.0, -1.0, (lr * each.to(tl.float64) * weight_decay).to(tl.float32))
                stride = (lr * each.to(tl.float64) * correction).to(tl.float32)
            index = first_index + first
            if aligned & (first + BLOCK <= numel):
                update_block(addresses, first, BLOCK, index, decay, stride, scalar, PARAM, GRAD, MOMENTS, MODE, AMSGRAD, BLOCK, True)
            elif first < numel:
                left = numel - first
                update_block(addresses, first, left, index, decay, stride, scalar, PARAM, GRAD, MOMENTS, MODE, AMSGRAD, BLOCK, False)
            first += BLOCK
            further = units_on(BLOCK, place, inner, BLOCK)
            around = units_on(further, unit, length, BLOCK)
            place += BLOCK - further * inner
            unit += further - around * length


def adamw(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Backend "triton": see adept_fast.ops.adamw.op. Takes real fp32, bf16 and fp16, with `step` on the parameters' device.

    It does not synchronise. A CUDA graph reads lr and betas given as tensors, steps and multipliers at each replay. Run one step before
    the capture, as torch asks: it compiles the kernels and reserves pinned memory.
    """
    updates = table.updates
    if not updates:
        return
    device = updates[0].param.device
    rows, setups = by_setup(table)
    numels = rows[WORD.numel :: WORDS]
    with torch.cuda.device_of(updates[0].param):
        tensors, groups = tensors_on(device, rows, updates), groups_on(device, table.options)
        chunks = chunks_on(device, numels, BLOCK * BLOCKS)
        scalars = torch.empty(len(updates), SCALARS.value, dtype=torch.float64, device=device)
        grid = (triton.cdiv(len(updates), TENSORS),)
        prepare_kernel[grid](tensors, groups, scalars, grad_scale, found_inf, len(updates), TENSORS=TENSORS, enable_fp_fusion=False)
        tensor = program = 0
        for setup, count in setups:
            programs = sum(-(-n // (BLOCK * BLOCKS)) for n in numels[tensor : tensor + count])
            if programs:
                update_kernel[(programs,)](
                    tensors,
                    chunks,
                    scalars,
                    program,
                    PARAM=TRITON_DTYPES[setup.param],
                    GRAD=TRITON_DTYPES[setup.grad],
                    MOMENTS=TRITON_DTYPES[setup.moments],
                    MODE=MODES[setup.mode],
                    AMSGRAD=setup.amsgrad,
                    BLOCK=BLOCK,
                    BLOCKS=BLOCKS,
                    enable_fp_fusion=False,
                )
            tensor, program = tensor + count, program + programs
