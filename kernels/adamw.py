"""AdamW for a list of tensors: one launch increments the steps and computes scalars, then one launch per combination of dtypes updates.

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
    w <- w - (rate weight_decay w + rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t)))
    rate = lr * multiplier

The operations and their order are those of csrc/adamw.h, each rounded once: fp32, with scalars and unit rates in fp64 until their last
rounding. All backends give the same bits, except for the payloads of NaN. A multiplier of 0 writes the old bits of parameter and master.

A table on the device has the addresses of the tensors, and a second one the tensor of each program (adamw_tables.py). 8-bit moments are
updated by whole blocks of 64 elements (adamw_eight_bit.py). Tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100;
untested on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adept_fast.kernels.adamw_moments import update_coded_moments, update_moments
from adept_fast.kernels.adamw_scalars import (
    CORRECTION,
    DITHER,
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
from adept_fast.kernels.adamw_tables import by_setup, chunks_on, groups_on, slots_of, tensors_on
from adept_fast.kernels.adamw_walk import CODED, next_blocks, unit_rates, units_on
from adept_fast.kernels.number_formats import TRITON_DTYPES, divided, is_finite, read, rounded, widened, write
from adept_fast.ops.adamw import masters
from adept_fast.ops.adamw.descriptors import WORD
from adept_fast.ops.adamw.table import Table
from adept_fast.ops.number_formats import MODES

BLOCK = 1024  # elements at a time; `quotient` is exact up to 1024
BLOCKS = 8  # consecutive blocks of one program
TENSORS = 64  # tensors of one program of prepare_kernel
COPY = tl.constexpr(MODES["copy"])
REMAINDER = tl.constexpr(MODES["remainder"])
KAHAN = tl.constexpr(MODES["kahan"])
STOCHASTIC = tl.constexpr(MODES["stochastic"])
REMAINDER8 = tl.constexpr(MODES["remainder8"])
DITHER_OFFSET = tl.constexpr(masters.DITHER_OFFSET)
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
EXP_AVG_SCALE_WORD = tl.constexpr(WORD.exp_avg_scale)
EXP_AVG_SQ_SCALE_WORD = tl.constexpr(WORD.exp_avg_sq_scale)
ROW_WORD = tl.constexpr(WORD.row)


@triton.jit
def update_block(
    addresses,
    span,
    scales,
    present,
    index,
    rates,
    scalar,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,
    MODE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update the elements of `span`: see `read`.

    scales: see update_coded_moments; None: moments are numbers.
    index: the numbers of the elements.
    rates: rate * weight_decay, or -1 for frozen elements, and the factor of m / (sqrt(v) + epsilon).
    """
    param_address, grad_address, exp_avg, exp_avg_sq, max_exp_avg_sq, master_address = addresses
    grad_scale, epsilon, weight1, weight2, slow1, slow2, key_low, key_high, dither = scalar
    decay, stride = rates
    moments = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    weights = (weight1, weight2, slow1, slow2)
    walked = dither + index.to(tl.uint32) * 0x6A09E667
    grad = widened(read(grad_address, span, GRAD, WHOLE), GRAD) * grad_scale
    if MOMENTS == tl.uint8:
        m, root = update_coded_moments(moments, span, scales, present, grad, weights, walked, WHOLE)
        param = read(param_address, span, PARAM, WHOLE)  # earlier, it would take registers that the codes need
    else:
        param = read(param_address, span, PARAM, WHOLE)
        m, root = update_moments(moments, span, grad, weights, MOMENTS, AMSGRAD, WHOLE)
    MASTER: tl.constexpr = tl.float32 if MODE == COPY else tl.int16 if MODE == REMAINDER else tl.int8 if MODE == REMAINDER8 else PARAM
    weight = widened(param, PARAM)
    if (MODE == COPY) | (MODE == REMAINDER) | (MODE == REMAINDER8) | (MODE == KAHAN):
        master = read(master_address, span, MASTER, WHOLE)
        if MODE == COPY:
            weight = tl.where(widened(rounded(master, PARAM), PARAM) == weight, master, weight)
        elif MODE == KAHAN:
            weight = weight + widened(master, PARAM)
        else:
            remainder = master.to(tl.int32) << 8 if MODE == REMAINDER8 else master.to(tl.int32)
            joined = ((param.to(tl.int32) << 16) + remainder).to(tl.float32, bitcast=True)
            weight = tl.where(joined != joined, weight, joined)  # NaN: the parameter was set to 0 through .data
    change = stride * divided(m, root + epsilon)
    # An infinite weight does not decay: inf - inf is no number.
    weight = weight - (tl.where(is_finite(weight), decay * weight, 0.0) + change)
    frozen = decay < 0.0
    bits = weight.to(tl.uint32, bitcast=True)
    if (MODE == REMAINDER) | (MODE == REMAINDER8):
        # A tie rounds away from zero, as the remainder of a tie to even may not fit 16 (8) bits.
        bits = bits + ((walked + DITHER_OFFSET) >> 24) if MODE == REMAINDER8 else bits
        low = tl.where(is_finite(weight), (bits >> 8 if MODE == REMAINDER8 else bits).to(MASTER), 0)
        new = tl.where(is_finite(weight), ((bits + 0x8000) >> 16).to(tl.uint16), rounded(weight, PARAM))
        write(master_address, span, tl.where(frozen, master, low), MASTER, WHOLE)
    elif MODE == STOCHASTIC:
        noise = mix(mix(index.to(tl.uint32) ^ key_low) + (index.to(tl.uint64) >> 32).to(tl.uint32) + key_high) >> 16
        new = tl.where(is_finite(weight), ((bits + noise) >> 16).to(tl.uint16), rounded(weight, PARAM))
    else:
        new = rounded(weight, PARAM)
        if MODE == COPY:
            write(master_address, span, tl.where(frozen, master, weight), MASTER, WHOLE)
        elif MODE == KAHAN:
            lost = rounded(tl.where(is_finite(weight), weight - widened(new, PARAM), 0.0), PARAM)
            write(master_address, span, tl.where(frozen, master, lost), MASTER, WHOLE)
    write(param_address, span, tl.where(frozen, param, new), PARAM, WHOLE)


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
        group = (tl.load(s + RATE), tl.load(s + WEIGHT_DECAY), tl.load(s + CORRECTION))
        scalar = (
            tl.load(s + GRAD_SCALE).to(tl.float32),
            tl.load(s + EPSILON).to(tl.float32),
            tl.load(s + WEIGHT1).to(tl.float32),
            tl.load(s + WEIGHT2).to(tl.float32),
            tl.load(s + SLOW1) != 0.0,
            tl.load(s + SLOW2) != 0.0,
            tl.load(s + KEY_LOW).to(tl.uint32),
            tl.load(s + KEY_HIGH).to(tl.uint32),
            tl.load(s + DITHER).to(tl.uint32),
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
        whole = tl.arange(0, BLOCK)
        if MOMENTS == tl.uint8:
            TOGETHER: tl.constexpr = BLOCK // CODED
            FEW: tl.constexpr = (TOGETHER + 3) // 4
            number = tl.arange(0, TOGETHER)
            in_block = tl.arange(0, CODED)
            average_scale = tl.load(row + EXP_AVG_SCALE_WORD).to(tl.pointer_type(tl.float32))
            root_scale = tl.load(row + EXP_AVG_SQ_SCALE_WORD).to(tl.pointer_type(tl.float32))
            size = tl.load(row + ROW_WORD)
            block = first // CODED  # `first` has counted the room of short last blocks too
            column = block % ((size + CODED - 1) // CODED)
            first = block // ((size + CODED - 1) // CODED) * size + column * CODED
            aligned = aligned & (size % CODED == 0)
            whole = number[:, None] * CODED + in_block[None, :]
        # Divide once, then move unit and place along.
        unit = first // inner
        place = first - unit * inner
        unit = unit % length
        for _ in range(0, BLOCKS):
            position = (unit, place, length, inner)
            if aligned & (first + BLOCK <= numel):
                scales = (average_scale + block + number, root_scale + block + number) if MOMENTS == tl.uint8 else None
                span = (first, whole, None)
                rates = unit_rates(multipliers, position, whole, group, BLOCK)
                index = first_index + first + whole
                update_block(addresses, span, scales, None, index, rates, scalar, PARAM, GRAD, MOMENTS, MODE, AMSGRAD, True)
            elif first < numel:
                if MOMENTS == tl.uint8:
                    # Blocks of such rows lie anywhere, so their addresses take registers: update fewer at a time.
                    for done in range(0, TOGETHER, FEW):
                        few = done + tl.arange(0, FEW)
                        begin, columns = next_blocks(few, column, size, TOGETHER)
                        present = first + begin < numel
                        offset = begin.to(tl.int32)[:, None] + in_block[None, :]
                        part = (first, offset, present[:, None] & (columns[:, None] * CODED + in_block[None, :] < size))
                        of_part = (average_scale + block + few, root_scale + block + few)
                        each = unit_rates(multipliers, position, offset, group, BLOCK)
                        i = first_index + first + offset
                        update_block(addresses, part, of_part, present, i, each, scalar, PARAM, GRAD, MOMENTS, MODE, AMSGRAD, False)
                else:
                    span = (first, whole, whole < numel - first)
                    rates = unit_rates(multipliers, position, whole, group, BLOCK)
                    index = first_index + first + whole
                    update_block(addresses, span, None, None, index, rates, scalar, PARAM, GRAD, MOMENTS, MODE, AMSGRAD, False)
            passed = BLOCK
            if MOMENTS == tl.uint8:
                passed, column = next_blocks(TOGETHER, column, size, TOGETHER)
                block += TOGETHER
            first += passed
            further = units_on(passed, place, inner, BLOCK)
            around = units_on(further, unit, length, BLOCK)
            place += passed - further * inner
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
    slots = slots_of(rows)
    with torch.cuda.device_of(updates[0].param):
        tensors, groups = tensors_on(device, rows, updates), groups_on(device, table.options)
        chunks = chunks_on(device, slots, BLOCK * BLOCKS)
        scalars = torch.empty(len(updates), SCALARS.value, dtype=torch.float64, device=device)
        grid = (triton.cdiv(len(updates), TENSORS),)
        prepare_kernel[grid](tensors, groups, scalars, grad_scale, found_inf, len(updates), TENSORS=TENSORS, enable_fp_fusion=False)
        tensor = program = 0
        for setup, count in setups:
            programs = sum(-(-n // (BLOCK * BLOCKS)) for n in slots[tensor : tensor + count])
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
