"""The formulas in plain torch: every fast backend is tested against these functions, and they are what runs where none is available."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamWOptions:
    """Hyperparameters of one parameter group."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    maximize: bool
    master_weights: str | None
    on_device: bool  # keep step, lr and betas as tensors: no host synchronisation, and gradients through them where asked for


@dataclass(frozen=True)
class AdamWTensors:
    """One parameter with its gradient, state and rates; `param`, `step`, the moments and `master` are written to.

    `master` is what `options.master_weights` needs: fp32 copy, int16 remainder, compensation, or None. `multipliers` (fp32) covers
    dimensions dim .. dim + ndim - 1 of `param`. Stochastic rounding tells parameters apart by `seed`, and elements by their index, counted
    in row-major order from `first_index`, which is not 0 where `param` is a slice of rows.
    """

    param: Tensor
    grad: Tensor
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    multipliers: Tensor | None
    dim: int
    seed: int
    options: AdamWOptions
    first_index: int = 0

    def rows(self, start: int, count: int) -> AdamWTensors:
        """The same for `count` indices of dimension 0, as views."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.narrow(0, start, count)

        multipliers = self.multipliers
        if multipliers is not None and multipliers.ndim > 0 and self.dim == 0:
            multipliers = cut(multipliers)
        cuts = {name: cut(getattr(self, name)) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")}
        first_index = self.first_index + start * (self.param.numel() // self.param.shape[0])
        return replace(self, **cuts, multipliers=multipliers, first_index=first_index)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    multipliers: Tensor | None,
    step: float | Tensor,
    options: AdamWOptions,
) -> None:
    """The AdamW update, in place, on real tensors of one shape and one dtype (fp32 or fp64), in torch.optim.AdamW's order of operations.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2            (amsgrad: vmax <- max(vmax, v), used for v below)
        w <- (1 - rate weight_decay) w
        w <- w - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)            rate = lr * multiplier

    `step` is t, the number of this update, from 1; an fp64 0-d tensor avoids host synchronisation, and is needed where lr or betas are
    tensors. `multipliers` broadcasts against `weight`. Source: Loshchilov and Hutter, arXiv 1711.05101; amsgrad: Reddi et al., arXiv
    1904.09237.
    """
    lr, beta1, beta2, decay = options.lr, options.beta1, options.beta2, options.weight_decay
    exp_avg.lerp_(grad, _as_weight(1 - beta1, weight))
    if isinstance(beta2, Tensor):
        exp_avg_sq.lerp_(grad.square(), _as_weight(1 - beta2, weight))
    else:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.clamp_(min=exp_avg_sq)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = (second.sqrt() / correction2**0.5).add_(options.eps)
    if multipliers is None and not isinstance(step, Tensor):
        if decay != 0:
            weight.mul_(1 - lr * decay)
        weight.addcdiv_(exp_avg, denominator, value=-(lr / correction1))
        return
    # In fp64 until the last cast, so that a unit gets the bits that a group with lr = lr * multiplier would give it.
    rate = lr if multipliers is None else lr * multipliers.double()
    if decay != 0:
        weight.mul_(_as_weight(1 - rate * decay, weight))
    weight.addcdiv_(exp_avg * _as_weight(-(rate / correction1), weight), denominator)


def adamw_update_(tensors: AdamWTensors, grad_scale: Tensor | None = None) -> None:
    """One update of one parameter of any dtype and layout. Arithmetic is fp32 (fp64 for fp64), results are rounded to the dtypes given.

    The gradient is first multiplied by `grad_scale`. Complex tensors are updated as pairs of reals. Where a multiplier is 0 neither
    the parameter nor its master is stored to, whatever the gradient holds; the moments move. Modes (`options.master_weights`):

        None          w = param
        "copy"        w = master, or param where the two disagree (someone edited it)     stored: fp32 master, param = round(w)
        "remainder"   w = join_master(param, remainder)                                   stored: split_master(w), exact
        "kahan"       w = param + compensation                                            stored: param = round(w), round(w - param)
        "stochastic"  w = param                                                           stored: param = stochastic_round(w)
    """
    options, multipliers = tensors.options, tensors.multipliers
    param, grad, exp_avg, exp_avg_sq, vmax = (
        torch.view_as_real(x) if x is not None and x.is_complex() else x
        for x in (tensors.param, tensors.grad.resolve_conj(), tensors.exp_avg, tensors.exp_avg_sq, tensors.max_exp_avg_sq)
    )
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    grad = grad.to(dtype)
    if grad_scale is not None:
        grad = grad * grad_scale
    if options.maximize:
        grad = -grad
    frozen = None
    if multipliers is not None:
        multipliers = multipliers.reshape(multipliers.shape + (1,) * (param.ndim - tensors.dim - multipliers.ndim))
        if multipliers.device.type != "cpu" or not multipliers.all():
            frozen = multipliers == 0
    mode = options.master_weights if needs_master(param) else None
    weight = _read_weight(mode, param, tensors.master)
    keep = torch.is_grad_enabled()  # autograd saves what it reads: work on copies, write back at the end
    if weight is param and (keep or frozen is not None):
        weight = param.clone()
    moments = [x if x is None else x.to(dtype, copy=keep) for x in (exp_avg, exp_avg_sq, vmax)]
    on_host = tensors.step.device.type == "cpu" and not options.on_device
    step = tensors.step.item() if on_host else tensors.step.to(param.device, torch.float64)
    adamw_(weight, grad, *moments, multipliers, step, options)
    for stored, value in zip((exp_avg, exp_avg_sq, vmax), moments, strict=True):
        if stored is not value:
            stored.copy_(value)
    if weight is not param:
        rounded, master = _round_weight(mode, weight, param.dtype, tensors)
        for stored, value in ((param, rounded), (tensors.master, master)):
            if value is not None:
                stored.copy_(value if frozen is None else torch.where(frozen, stored, value.to(stored.dtype)))


def needs_master(param: Tensor) -> bool:
    """Whether `param` is of low precision; fp32, fp64 and complex parameters are their own master."""
    return param.is_floating_point() and param.dtype.itemsize < 4


def _read_weight(mode: str | None, param: Tensor, master: Tensor | None) -> Tensor:
    weight = param if param.dtype == torch.float64 else param.float()
    if mode == "copy":
        return torch.where(master.to(param.dtype) == param, master, weight)
    if mode == "remainder":
        return join_master(param, master)
    return weight + master if mode == "kahan" else weight


def _round_weight(mode: str | None, weight: Tensor, dtype: torch.dtype, tensors: AdamWTensors) -> tuple[Tensor, Tensor | None]:
    if mode == "remainder":
        return split_master(weight)
    if mode == "stochastic":
        return stochastic_round(weight, tensors.seed, tensors.step, tensors.first_index), None
    rounded = weight.to(dtype)
    if mode == "kahan":
        return rounded, weight - rounded
    return rounded, weight if mode == "copy" else None


def _as_weight(value: float | Tensor, weight: Tensor) -> float | Tensor:
    return value.to(weight.device, weight.dtype) if isinstance(value, Tensor) else value


def split_master(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 nearest to it, int16 remainder); exact: join_master gives the same bits back, except for the payload of a NaN.

    With X the fp32 bits: remainder = the low 16 bits of X as a signed number, bf16 bits = (X - remainder) / 2^16. A tie thus rounds away
    from zero: round-to-even would leave a remainder of +32768, which int16 does not hold.
    """
    bits = weight.view(torch.int32)
    remainder = bits.to(torch.int16)
    number = weight.isfinite()
    return torch.where(number, (bits - remainder).view(torch.float32), weight).to(torch.bfloat16), torch.where(number, remainder, 0)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """(bf16, int16 remainder) -> the fp32 weight with bits 2^16 * bf16 bits + remainder; the inverse of split_master."""
    return ((param.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def stochastic_round(weight: Tensor, seed: int, step: float | Tensor, first_index: int = 0) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the expectation exact; bf16 values, infinities and NaN stay.

    The low 16 bits of the fp32 pattern plus r decide, r = top 16 bits of a hash of (seed, step, element index), all arithmetic modulo
    2^32 with mix(x) = x ^= x >> 16; x *= 0x21f0aaad; x ^= x >> 15; x *= 0x735a2d97; x ^= x >> 15:

        key = mix(mix(seed + 0x9e3779b9) ^ step)        r = mix(mix(low32(index) ^ key) + high32(index) + mix(key + 0x9e3779b9)) >> 16

    `index` counts elements in row-major order of the shape, from `first_index`.
    """
    step = torch.as_tensor(step).to(weight.device, torch.int64)
    key = _mix(_mix(torch.full_like(step, (seed + _GOLDEN) & _LOW)) ^ (step & _LOW))
    index = torch.arange(first_index, first_index + weight.numel(), device=weight.device).view(weight.shape)
    noise = _mix((_mix((index & _LOW) ^ key) + (index >> 32) + _mix((key + _GOLDEN) & _LOW)) & _LOW) >> 16
    bits = (weight.view(torch.int32) + noise.to(torch.int32)) & -0x10000
    return torch.where(weight.isfinite(), bits.view(torch.float32), weight).to(torch.bfloat16)


_LOW, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    # int64 holds 32-bit values; both factors are below 2^31, so no product overflows. Constants: hash-prospector's best two-round mix.
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def clip_scale(grads: Sequence[Tensor], max_norm: float, inverse_scale: Tensor | None = None) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), norm the 2-norm of all `grads` together times `inverse_scale`: torch.nn.utils.clip_grad_norm_.

    Accumulated in fp32 (fp64 where a gradient is fp64); a 0-d tensor on the first gradient's device; nan where the norm is nan.
    """
    norms = []
    for grad in grads:
        grad = torch.view_as_real(grad) if grad.is_complex() else grad
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        norms.append(torch.linalg.vector_norm(grad, dtype=dtype).to(grads[0].device))
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    norm = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
    if inverse_scale is not None:
        norm = norm * inverse_scale.to(norm.device)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def saliency_sums(param: Tensor, grad: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per index of dimension `dim`, over all other dimensions: (sum g^2, sum |theta g|, sum theta g).

    `param`, `grad`: one shape, at least one dimension. Three fp32 vectors of length param.shape[dim], accumulated in fp32 (fp64 for fp64).
    """
    dtype = torch.float64 if torch.float64 in (param.dtype, grad.dtype) else torch.float32
    length = param.shape[dim]
    theta, g = (x.detach().movedim(dim, 0).reshape(length, x.numel() // max(length, 1)).to(dtype) for x in (param, grad))
    product = theta * g
    return tuple(x.sum(1).float() for x in (g.square(), product.abs(), product))
