"""AdamW with unit rates, master weights and clipping in plain torch: the definition that all backends follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdamWOptions(NamedTuple):
    """Hyperparameters of one parameter group. lr and betas given as 0-d tensors are read on their device."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    maximize: bool
    master_weights: str | None


class Update(NamedTuple):
    """The update of one parameter, as every backend takes it.

    All tensors but `step` and `multipliers` are real, dense, of one shape and in one memory order.
    param, exp_avg, exp_avg_sq, max_exp_avg_sq: updated in place.
    master: fp32 copy, int16 remainder, compensation, or None, by options.master_weights; updated in place.
    step: fp32, 0-d; incremented.
    multipliers: fp32 [length], on the parameter's device, or None (all 1). Element i in memory has multipliers[(i // inner) % length].
    first_index: number of the first element in the unsharded parameter, for stochastic rounding.
    seed: number of the parameter, for stochastic rounding.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    step: Tensor
    multipliers: Tensor | None
    length: int
    inner: int
    first_index: int
    seed: int
    options: AdamWOptions


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    multipliers: Tensor | None,
    step: float | Tensor,
    options: AdamWOptions,
) -> Tensor:
    """Return the new weight, and update the moments in place.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
        w <- w - (rate weight_decay w + rate sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps sqrt(1 - beta2^t)))
        rate = lr * multiplier

    weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq: real, of one shape and one dtype (fp32 or fp64).
    multipliers: broadcasts against `weight`; 0 leaves the weight as it is.
    step: t, the number of this update, from 1. If lr or betas are tensors: fp64, 0-d, which avoids a synchronisation with the host.

    Every operation is rounded once, in the order of csrc/adamw.h, so that backends agree bit for bit. Two changes of torch's order lose
    less precision: sqrt(1 - beta2^t) is taken out of the denominator, and decay and step are added before they are subtracted from w.
    Source: Loshchilov and Hutter, arXiv 1711.05101; amsgrad: Reddi et al., arXiv 1904.09237.
    """
    lr, beta1, beta2 = options.lr, options.beta1, options.beta2
    _average_(exp_avg, grad, beta1)
    _average_(exp_avg_sq, grad * grad, beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.clamp_(min=exp_avg_sq)
    root = (1 - power(beta2, step)) ** 0.5
    rate = lr if multipliers is None else lr * multipliers.double()
    stride = _rounded(rate * (root / (1 - power(beta1, step))), weight)
    decay = _rounded(rate * options.weight_decay, weight)
    # On CPUs torch's fp32 square root is off by one ulp for every fifth number. The rounded fp64 one is exact.
    change = (exp_avg / (second.double().sqrt().to(weight.dtype) + _rounded(options.eps * root, weight))) * stride
    # An infinite weight does not decay: inf - inf is no number.
    moved = weight - (torch.where(weight.isfinite(), weight * decay, 0) + change)
    return moved if multipliers is None else torch.where(multipliers == 0, weight, moved)


def _average_(old: Tensor, value: Tensor, beta: float | Tensor) -> None:
    """old <- beta old + (1 - beta) value, computed from the one with the larger weight, so that beta = 0 gives exactly `value`."""
    if isinstance(beta, Tensor):
        slow = old + (value - old) * _rounded(1 - beta, old)
        old.copy_(torch.where(beta.to(old.device) >= 0.5, slow, value + (old - value) * _rounded(beta, old)))
    elif beta >= 0.5:
        old.add_((value - old) * (1 - beta))
    else:
        old.copy_(value + (old - value) * beta)


def power(base: float | Tensor, count: float | Tensor) -> float | Tensor:
    """base ** count. Of numbers by squaring: the same bits as native code, unlike pow of a C library."""
    if isinstance(base, Tensor) or isinstance(count, Tensor):
        return base**count
    result, count = 1.0, int(count)
    while count:
        if count & 1:
            result *= base
        base *= base
        count >>= 1
    return result


def adamw_update_(update: Update, grad_scale: Tensor | None = None) -> None:
    """Update one parameter, its state and its `step` in place.

    Computes in fp32 (fp64 for fp64 parameters) and rounds to the dtypes of `update`.
    The gradient is first multiplied by `grad_scale`. A multiplier of 0 leaves parameter and master, but not the moments, as they are.
    Modes of options.master_weights for 16-bit parameters:

        None          w = param
        "copy"        w = master, or param if round(master) differs (it was edited)       stored: fp32 master, param = round(w)
        "remainder"   w = join_master(param, remainder)                                   stored: split_master(w), exact
        "kahan"       w = param + compensation                                            stored: param = round(w), round(w - param)
        "stochastic"  w = param                                                           stored: param = stochastic_round(w)
    """
    options = update.options
    update.step.add_(1)
    differentiable = torch.is_grad_enabled()
    on_host = update.step.device.type == "cpu" and not isinstance(options.lr, Tensor) and not differentiable
    step = update.step.item() if on_host else update.step.to(update.param.device, torch.float64)
    for first, shape, multipliers in _blocks(update, whole=differentiable):
        strides = (shape[1] * shape[2], shape[2], 1)

        def cut(x: Tensor, shape: tuple[int, ...] = shape, strides: tuple[int, ...] = strides, first: int = first) -> Tensor:
            return x.as_strided(shape, strides, x.storage_offset() + first)

        block = update._replace(
            param=cut(update.param),
            grad=cut(update.grad),
            exp_avg=cut(update.exp_avg),
            exp_avg_sq=cut(update.exp_avg_sq),
            max_exp_avg_sq=None if update.max_exp_avg_sq is None else cut(update.max_exp_avg_sq),
            master=None if update.master is None else cut(update.master),
            multipliers=multipliers,
            first_index=update.first_index + first,
        )
        _update_block(block, step, grad_scale)


def _blocks(update: Update, whole: bool) -> Iterator[tuple[int, tuple[int, int, int], Tensor | None]]:
    """Yield (first element, shape [periods, units, elements], multipliers) of blocks whose temporaries fit into a CPU's cache."""
    length, inner = update.length, update.inner
    periods = update.param.numel() // (length * inner)
    multipliers = None if update.multipliers is None else update.multipliers.view(1, length, 1)
    limit = update.param.numel() if whole else 2**17 if update.param.device.type == "cpu" else 2**26
    if periods == 1:
        units = max(1, limit // inner)
        for first in range(0, length, units):
            count = min(units, length - first)
            yield first * inner, (1, count, inner), multipliers if multipliers is None else multipliers.narrow(1, first, count)
        return
    step = max(1, limit // (length * inner))
    for first in range(0, periods, step):
        yield first * length * inner, (min(step, periods - first), length, inner), multipliers


def _update_block(block: Update, step: float | Tensor, grad_scale: Tensor | None) -> None:
    """Update a block. Its multipliers broadcast against it. step: the number of this update."""
    param, multipliers, options = block.param, block.multipliers, block.options
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    grad = block.grad.to(dtype)
    if grad_scale is not None:
        grad = grad * grad_scale
    if options.maximize:
        grad = -grad
    mode = options.master_weights if needs_master(param) else None
    # Autograd saves the tensors that it reads. Under it, work on copies and write them back at the end.
    copy = torch.is_grad_enabled()
    exp_avg, exp_avg_sq = block.exp_avg.to(dtype, copy=copy), block.exp_avg_sq.to(dtype, copy=copy)
    max_exp_avg_sq = None if block.max_exp_avg_sq is None else block.max_exp_avg_sq.to(dtype, copy=copy)
    weight = _read_weight(mode, param, block.master)
    if copy and weight is param:
        weight = param.clone()
    weight = adamw_(weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, multipliers, step, options)
    moments = ((block.exp_avg, exp_avg), (block.exp_avg_sq, exp_avg_sq), (block.max_exp_avg_sq, max_exp_avg_sq))
    for stored, value in moments:
        if stored is not None and value is not None and stored is not value:
            stored.copy_(value)
    rounded, new_master = _round_weight(mode, weight, param.dtype, block.seed, step, block.first_index)
    for stored, value in ((param, rounded), (block.master, new_master)):
        if stored is not None and value is not None:
            stored.copy_(value if multipliers is None else torch.where(multipliers == 0, stored, value.to(stored.dtype)))


def needs_master(param: Tensor) -> bool:
    """Whether `param` is bf16 or fp16."""
    return param.is_floating_point() and param.dtype.itemsize < 4


def _read_weight(mode: str | None, param: Tensor, master: Tensor | None) -> Tensor:
    weight = param if param.dtype == torch.float64 else param.float()
    if mode not in ("copy", "remainder", "kahan"):
        return weight
    assert master is not None
    if mode == "copy":
        return torch.where(master.to(param.dtype) == param, master, weight)
    if mode == "remainder":
        return join_master(param, master)
    return weight + master


def _round_weight(
    mode: str | None, weight: Tensor, dtype: torch.dtype, seed: int, step: float | Tensor, first_index: int
) -> tuple[Tensor, Tensor | None]:
    if mode == "remainder":
        return split_master(weight)
    if mode == "stochastic":
        return stochastic_round(weight, seed, step, first_index), None
    rounded = weight.to(dtype)
    if mode == "kahan":
        return rounded, torch.where(weight.isfinite(), weight - rounded, 0)
    return rounded, weight if mode == "copy" else None


def _rounded(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Convert a tensor to the dtype of `like`. A number is rounded by the operation that uses it."""
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def split_master(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 exactly into (nearest bf16, int16 remainder). join_master restores the bits, except for the payload of a NaN.

    With X the fp32 bits: remainder = the low 16 bits of X as a signed number, bf16 bits = (X - remainder) / 2^16. A tie rounds away from
    zero, because rounding to even could need a remainder of +32768, which int16 does not have.
    """
    bits = weight.view(torch.int32)
    remainder = bits.to(torch.int16)
    number = weight.isfinite()
    return torch.where(number, (bits - remainder).view(torch.float32), weight).to(torch.bfloat16), torch.where(number, remainder, 0)


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
    key = _mix(_mix(torch.full_like(step, (seed + _GOLDEN) & _LOW)) ^ (step & _LOW))
    index = torch.arange(first_index, first_index + weight.numel(), device=weight.device).view(weight.shape)
    noise = _mix((_mix((index & _LOW) ^ key) + (index >> 32) + _mix((key + _GOLDEN) & _LOW)) & _LOW) >> 16
    bits = (weight.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(weight.isfinite(), bits.view(torch.float32), weight).to(torch.bfloat16)


_LOW, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    # 32-bit values in int64. Both factors are below 2^31, so no product overflows. Constants: the best two-round mix of hash-prospector.
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """Sum the squares of all elements of `grads`, all on one device, in fp64: fp64, 0-d."""
    norms = torch._foreach_norm(list(grads), dtype=torch.float64)
    return torch.stack(norms).square().sum()


def clip_scale(squares: Tensor, max_norm: float, inverse_scale: Tensor | None = None) -> Tensor:
    """Return the factor that clips gradients to a 2-norm of `max_norm`, as torch.nn.utils.clip_grad_norm_, after unscaling them.

        inverse_scale * min(1, max_norm / (norm + 1e-6))        norm = sqrt(squares) * inverse_scale

    squares: sum of the squares of the scaled gradients, fp64. Returns fp64; NaN if the norm is NaN.
    """
    norm = squares.sqrt()
    if inverse_scale is None:
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)
    inverse = inverse_scale.to(squares.device, torch.float64)
    return inverse * (max_norm / (norm * inverse + 1e-6)).clamp(max=1.0)
