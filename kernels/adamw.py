"""AdamW for lists of tensors in two kinds of launch: one that steps counters and prepares scalars, and one update per set-up of dtypes.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
    w <- w - (rate weight_decay w + rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t)))
    rate = lr * multiplier

The operations of csrc/adamw.h in its order, each rounded once: fp32, scalars and unit rates in fp64 until their last rounding. Backends
agree bit for bit, but for which NaN a NaN is. Where a multiplier is 0, the bits that stood in parameter and master are written back.

Tensors are found through a table on the device, and programs find their tensor through a map (adamw_tables.py). Tested in Triton's
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
from adept_fast.ops.adamw.descriptors import WORD, WORDS
from adept_fast.ops.adamw.table import Table
from adept_fast.ops.native_formats import MODES

BLOCK = 1024  # elements at a time; unit numbers are computed exactly up to 1024
BLOCKS = 8  # in a row, by one program
TENSORS = 64  # prepared by one program
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
# Triton's own division and square root flush denormals; its interpreter, which does not, knows no PTX.
PTX = tl.constexpr(isinstance(mix, triton.JITFunction) and torch.version.hip is None)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointers(address, first, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    # bf16 as bits: the interpreter's own conversion truncates.
    start = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE)) + first
    if WHOLE:
        # An address out of a table says nothing of its alignment, and without it accesses are one element wide.
        start = tl.multiple_of(start, 16)
    return start + tl.arange(0, BLOCK)


@triton.jit
def read(address, first, inside, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Elements as stored, bf16 as uint16."""
    place = pointers(address, first, DTYPE, BLOCK, WHOLE)
    return tl.load(place) if WHOLE else tl.load(place, mask=inside, other=0)


@triton.jit
def write(address, first, inside, stored, DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    place = pointers(address, first, DTYPE, BLOCK, WHOLE)
    if WHOLE:
        tl.store(place, stored)
    else:
        tl.store(place, stored, mask=inside)


@triton.jit
def widened(stored, DTYPE: tl.constexpr):
    """As stored -> fp32."""
    if DTYPE == tl.bfloat16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 -> as stored, to nearest even."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, nearest).to(tl.uint16)
    else:
        return x.to(DTYPE)


@triton.jit
def is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


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


@triton.jit
def average(old, value, weight, slow):
    """From the old value by `weight` where slow, else from the new one."""
    start = tl.where(slow, old, value)
    return start + weight * (tl.where(slow, value, old) - start)


@triton.jit
def quotient(offset, divisor, BLOCK: tl.constexpr):
    """max(offset, 0) // divisor for offset < 2 BLOCK, divisor <= BLOCK: exact for BLOCK <= 1024, without a division per element."""
    reciprocal = ((2097152 + divisor - 1) // divisor).to(tl.uint32)
    return ((tl.maximum(offset, 0).to(tl.uint32) * reciprocal) >> 21).to(tl.int32)


@triton.jit
def units_on(elements, place, inner, BLOCK: tl.constexpr):
    """How many unit boundaries lie within `elements` (<= BLOCK) from `place` in a unit of `inner` elements."""
    # A unit longer than BLOCK ends at most once; it is taken for its last BLOCK elements.
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
    """Update `left` elements from `first` on. decay: rate weight_decay, -1 where frozen; stride: what m / (sqrt(v) + epsilon) is times."""
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
            weight = tl.where(joined != joined, weight, joined)  # of a parameter set to 0 behind the optimizer's back
        else:
            weight = weight + widened(master, PARAM)
    change = stride * divided(m, square_root(second) + epsilon)
    # An infinite weight does not decay: inf - inf is no number.
    weight = weight - (tl.where(is_finite(weight), decay * weight, 0.0) + change)
    frozen = decay < 0.0
    bits = weight.to(tl.uint32, bitcast=True)
    if MODE == REMAINDER:
        # A tie rounds away from zero: the remainder of a tie to even does not fit.
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
    """Each program updates BLOCKS blocks of one tensor: `chunks` says which tensor, and which part of it."""
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
        # 64-bit division is slow: once here, then unit and place in it move along.
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
    """Backend "triton": see adept_fast.ops.adamw.op. fp32, bf16 and fp16, real, `step` on the parameters' device.

    Nothing waits for the device. In a CUDA graph, lr and betas given as tensors, steps and multipliers are read at each replay; one
    step outside of it comes first, as torch asks, because pinned memory is reserved and kernels are compiled there.
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
