"""Increments every tensor's step and computes the scalars of its update, on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from adept_fast.ops.adamw.descriptors import GROUP_WORD, GROUP_WORDS, WORD, WORDS

ROW = tl.constexpr(WORDS)
GROUP = tl.constexpr(WORD.group)
SEED = tl.constexpr(WORD.seed)
STEP = tl.constexpr(WORD.step)
GROUP_ROW = tl.constexpr(GROUP_WORDS)
LR = tl.constexpr(GROUP_WORD.lr)
BETA1 = tl.constexpr(GROUP_WORD.beta1)
BETA2 = tl.constexpr(GROUP_WORD.beta2)
EPS = tl.constexpr(GROUP_WORD.eps)
DECAY = tl.constexpr(GROUP_WORD.weight_decay)
MAXIMIZE = tl.constexpr(GROUP_WORD.maximize)
LR_ADDRESS = tl.constexpr(GROUP_WORD.lr_address)
BETA1_ADDRESS = tl.constexpr(GROUP_WORD.beta1_address)
BETA2_ADDRESS = tl.constexpr(GROUP_WORD.beta2_address)
KINDS = tl.constexpr(GROUP_WORD.kinds)
# Columns of `scalars`.
SCALARS = tl.constexpr(13)
RATE = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
CORRECTION = tl.constexpr(2)
GRAD_SCALE = tl.constexpr(3)
EPSILON = tl.constexpr(4)
WEIGHT1 = tl.constexpr(5)
WEIGHT2 = tl.constexpr(6)
SLOW1 = tl.constexpr(7)
SLOW2 = tl.constexpr(8)
KEY_LOW = tl.constexpr(9)
KEY_HIGH = tl.constexpr(10)
DITHER = tl.constexpr(11)
UPDATES = tl.constexpr(12)


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def hyperparameter(group, word: tl.constexpr, address_word: tl.constexpr, number_of_kind: tl.constexpr, inside):
    """Load lr, beta1 or beta2 of each tensor's group: the number in the table, or the value at the address in the table."""
    number = tl.load(group + word, mask=inside, other=0).to(tl.float64, bitcast=True)
    address = tl.load(group + address_word, mask=inside, other=0)
    kind = (tl.load(group + KINDS, mask=inside, other=0) >> (2 * number_of_kind)) & 3
    narrow = tl.load(address.to(tl.pointer_type(tl.float32)), mask=kind == 1, other=0.0).to(tl.float64)
    wide = tl.load(address.to(tl.pointer_type(tl.float64)), mask=kind == 2, other=0.0)
    return tl.where(kind == 1, narrow, tl.where(kind == 2, wide, number))


@triton.jit(do_not_specialize=["tensors"])
def prepare_kernel(rows, groups, scalars, grad_scale, found_inf, tensors, TENSORS: tl.constexpr):
    """Write `scalars`, fp64 [tensors, SCALARS]. Columns, in their order:

        lr, weight_decay, sqrt(1 - beta2^t) / (1 - beta1^t), factor of gradients, eps sqrt(1 - beta2^t), weights of both averages,
        whether each average moves from its old value, two keys of stochastic rounding, the dither of element 0, whether to update

    If found_inf is not 0, no tensor is updated and no step is incremented.
    """
    i = tl.program_id(0).to(tl.int64) * TENSORS + tl.arange(0, TENSORS)
    inside = i < tensors
    row = rows + i * ROW
    group = groups + tl.load(row + GROUP, mask=inside, other=0) * GROUP_ROW
    lr = hyperparameter(group, LR, LR_ADDRESS, 0, inside)
    beta1 = hyperparameter(group, BETA1, BETA1_ADDRESS, 1, inside)
    beta2 = hyperparameter(group, BETA2, BETA2_ADDRESS, 2, inside)
    eps = tl.load(group + EPS, mask=inside, other=0).to(tl.float64, bitcast=True)
    weight_decay = tl.load(group + DECAY, mask=inside, other=0).to(tl.float64, bitcast=True)
    maximize = tl.load(group + MAXIMIZE, mask=inside, other=0).to(tl.float64, bitcast=True)
    found = tl.zeros([TENSORS], tl.float32)
    if found_inf is not None:
        found += tl.load(found_inf)
    finite = inside & (found == 0.0)
    counter = tl.load(row + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=inside, other=0.0) + 1.0
    tl.store(counter, step, mask=finite)
    t = step.to(tl.int32)
    # By squaring, as in csrc/adamw.h, with a fixed number of turns, as the interpreter needs it.
    power1 = tl.full([TENSORS], 1.0, tl.float64)
    power2 = tl.full([TENSORS], 1.0, tl.float64)
    base1 = beta1
    base2 = beta2
    for bit in tl.static_range(31):
        odd = ((t >> bit) & 1) != 0
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
    root = tl.sqrt(1.0 - power2)
    scale = tl.full([TENSORS], 1.0, tl.float64)
    if grad_scale is not None:
        scale = scale * tl.load(grad_scale).to(tl.float64)
    seed = tl.load(row + SEED, mask=inside, other=0).to(tl.uint32)
    hashed = mix(seed + 0x9E3779B9)
    key = mix(hashed ^ t.to(tl.uint32))
    target = scalars + i * SCALARS
    tl.store(target + RATE, lr, mask=inside)
    tl.store(target + WEIGHT_DECAY, weight_decay, mask=inside)
    tl.store(target + CORRECTION, root / (1.0 - power1), mask=inside)
    tl.store(target + GRAD_SCALE, tl.where(maximize != 0.0, -scale, scale), mask=inside)
    tl.store(target + EPSILON, eps * root, mask=inside)
    tl.store(target + WEIGHT1, tl.where(beta1 >= 0.5, 1.0 - beta1, beta1), mask=inside)
    tl.store(target + WEIGHT2, tl.where(beta2 >= 0.5, 1.0 - beta2, beta2), mask=inside)
    tl.store(target + SLOW1, (beta1 >= 0.5).to(tl.float64), mask=inside)
    tl.store(target + SLOW2, (beta2 >= 0.5).to(tl.float64), mask=inside)
    tl.store(target + KEY_LOW, key.to(tl.float64), mask=inside)
    tl.store(target + KEY_HIGH, mix(key + 0x9E3779B9).to(tl.float64), mask=inside)
    tl.store(target + DITHER, (hashed + t.to(tl.uint32) * 0x9E3779B9).to(tl.float64), mask=inside)
    tl.store(target + UPDATES, finite.to(tl.float64), mask=inside)
