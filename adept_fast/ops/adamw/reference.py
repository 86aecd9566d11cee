"""AdamW with unit rates, master weights and clipping in plain torch: the definition that all backends follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw import eight_bit
from adept_fast.ops.adamw.masters import needs_master, read_weight, round_weight


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
    master: fp32 copy, int16 or int8 remainder, compensation, or None, by options.master_weights; updated in place.
    step: fp32, 0-d; incremented.
    multipliers: fp32 [length], on the parameter's device, or None (all 1). Element i in memory has multipliers[(i // inner) % length].
    first_index: number of the first element in the unsharded parameter, for stochastic rounding.
    seed: number of the parameter, for stochastic rounding.
    exp_avg_scale, exp_avg_sq_scale: of 8-bit moments (eight_bit.py), fp32, row-major; updated in place. None: moments are no codes.
    row: elements of a row of 8-bit moments, else 0.
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
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    row: int = 0


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
        "remainder8"  the same with the upper 8 bits of the remainder, dithered           stored: split_master8(w, dither)
        "kahan"       w = param + compensation                                            stored: param = round(w), round(w - param)
        "stochastic"  w = param                                                           stored: param = stochastic_round(w)
    """
    options = update.options
    if update.exp_avg_scale is not None:
        _adamw_update_8bit_(update, grad_scale)
        return
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


def _adamw_update_8bit_(update: Update, grad_scale: Tensor | None) -> None:
    """Update with decoded moments, and encode the new ones."""
    assert update.exp_avg_scale is not None and update.exp_avg_sq_scale is not None
    m, v = eight_bit.decode(update.exp_avg, update.exp_avg_scale, update.exp_avg_sq, update.exp_avg_sq_scale, update.row)
    adamw_update_(update._replace(exp_avg=m, exp_avg_sq=v, exp_avg_scale=None, exp_avg_sq_scale=None), grad_scale)
    stored = (update.exp_avg, update.exp_avg_scale, update.exp_avg_sq, update.exp_avg_sq_scale)
    dither = eight_bit.dither_of(m.shape, update.seed, update.step, update.first_index, m.device)
    for tensor, value in zip(stored, eight_bit.encode(m, v, update.row, dither), strict=True):
        tensor.copy_(value.view(tensor.shape))


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
    weight = read_weight(mode, param, block.master)
    if copy and weight is param:
        weight = param.clone()
    weight = adamw_(weight, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, multipliers, step, options)
    moments = ((block.exp_avg, exp_avg), (block.exp_avg_sq, exp_avg_sq), (block.max_exp_avg_sq, max_exp_avg_sq))
    for stored, value in moments:
        if stored is not None and value is not None and stored is not value:
            stored.copy_(value)
    rounded, new_master = round_weight(mode, weight, param.dtype, block.seed, step, block.first_index)
    for stored, value in ((param, rounded), (block.master, new_master)):
        if stored is not None and value is not None:
            stored.copy_(value if multipliers is None else torch.where(multipliers == 0, stored, value.to(stored.dtype)))


def _rounded(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Convert a tensor to the dtype of `like`. A number is rounded by the operation that uses it."""
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


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
