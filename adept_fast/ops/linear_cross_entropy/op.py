"""Cross-entropy of a linear head, without storing its logits.

    z_v = cap tanh(scale (w_v . h + b_v) / cap)        loss = log sum_v exp z_v - z_target        KL = sum_v p_v (log p_v - log q_v)

The vocabulary is processed in blocks with a running maximum and sum, so memory does not grow with it. Accumulation is fp32 (fp64 for fp64).
The gradient to `hidden` comes from the same pass: its sum is rescaled whenever the maximum grows. The head must be frozen.
Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867); losses without logits (Wijmans et al., arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.linear_cross_entropy import reference
from adept_fast.ops.linear_cross_entropy.reference import Projection
from adept_fast.ops.number_formats import accumulator

IGNORE = -100
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTORS = 1e-30, 1e30  # bounds of scale and soft-cap whose reciprocals are fp32 numbers too


class Divergence(NamedTuple):
    """losses: nats [variants, rows]. kl: KL(variant 0 || variant), nats [variants, rows]. Both are 0 in rows without a target."""

    losses: Tensor
    kl: Tensor


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute the loss of each row, differentiable in `hidden`: F.cross_entropy(logits, targets, reduction="none") without logits.

    hidden: [..., width], fp32, bf16, fp16 or fp64.
    targets: token ids, int64 [...]; -100: no target. Such a row has loss 0, takes no time and has gradient 0, even if it is multiplied
        by NaN, as in F.cross_entropy.
    backend: see dispatch.resolve.

    Returns nats, fp32 (fp64 for fp64), of the shape of `targets`.
    Raises InputError for shapes, dtypes or devices that do not match, a head that requires a gradient, and a second derivative.
    A target outside the vocabulary raises IndexError on a CPU. On a GPU, whose kernels do not synchronise, its loss and gradient are NaN.
    """
    hidden, head = _cast(hidden, head, targets)
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    if hidden.requires_grad and torch.is_grad_enabled():
        losses: Tensor = torch.ops.adept_fast.linear_cross_entropy(
            rows, head.weight, head.bias, targets.flatten(), head.scale, head.softcap, backend
        )[0]
    else:
        chosen = dispatch.resolve("linear_cross_entropy", hidden.device, backend)
        losses = _with_targets(chosen, rows, head, targets.flatten(), False)[0]
    return losses.view(targets.shape)


def linear_predictions(hidden: Tensor, head: Projection, targets: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Compute losses as `linear_cross_entropy`, and the most likely token of every row (int64), without a gradient."""
    hidden, head = _cast(hidden, head, targets)
    chosen = dispatch.resolve("linear_cross_entropy", hidden.device, backend)
    known = torch.where(targets == IGNORE, 0, targets).flatten()
    found = _run(chosen, hidden.reshape(targets.numel(), hidden.shape[-1]).detach(), head, known, 0, False)
    return torch.where(targets == IGNORE, 0, found.losses.view(targets.shape)), found.argmax.view(targets.shape)


def linear_divergence(hidden: Tensor, head: Projection, targets: Tensor, *, backend: str | None = None) -> Divergence:
    """Compute the losses of several variants of a model and their divergence from the first, without a gradient.

    hidden: [variants, rows, width]. targets: int64 [rows]; -100: no target.
    """
    if hidden.ndim != 3 or len(hidden) == 0 or targets.shape != hidden.shape[1:2]:
        raise InputError(f"expected hidden [variants, rows, width] and targets [rows], found {_shapes(hidden, None, targets)}")
    variants, rows = hidden.shape[:2]
    hidden, head = _cast(hidden, head, targets.expand(variants, rows))
    chosen = dispatch.resolve("linear_cross_entropy", hidden.device, backend)
    there = (targets != IGNORE).nonzero()[:, 0]
    found = _run(chosen, hidden.detach()[:, there].flatten(0, 1), head, targets[there].repeat(variants), variants, False)
    losses, kl = (found.losses.new_zeros(variants, rows) for _ in range(2))
    losses[:, there], kl[:, there] = found.losses.view(variants, -1), found.kl.view(variants, -1)
    return Divergence(losses, kl)


def _cast(hidden: Tensor, head: Projection, targets: Tensor) -> tuple[Tensor, Projection]:
    """Convert hidden states and head to the dtype of their product: autocast's, or the promoted one."""
    _require_fitting(hidden, head, targets)
    weight, bias = head.weight, head.bias
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise InputError("linear_cross_entropy computes no gradient of the head: freeze it (requires_grad_(False)) or use F.cross_entropy")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), head._replace(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))


def _require_fitting(hidden: Tensor, head: Projection, targets: Tensor) -> None:
    """Raise InputError for a shape, dtype, device or factor that does not fit, as backends check nothing."""
    weight, bias = head.weight, head.bias
    if (
        hidden.ndim < 1
        or hidden.shape[:-1] != targets.shape
        or weight.ndim != 2
        or hidden.shape[-1] != weight.shape[1]
        or weight.shape[0] == 0
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise InputError(
            "expected hidden [..., width], weight [vocabulary, width], bias [vocabulary] or None and targets [...], found "
            + _shapes(hidden, head, targets)
        )
    floats = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, x in floats.items():
        if x.dtype not in FLOATS:
            raise InputError(f"{name} must be fp32, bf16, fp16 or fp64, found {x.dtype}")
    if targets.dtype != torch.int64:
        raise InputError(f"targets must be int64, found {targets.dtype}")
    for name, x in {**floats, "targets": targets}.items():
        if x.device != hidden.device or x.device.type == "meta":
            where = f"hidden is on {hidden.device}, {name} on {x.device}"
            raise InputError(f"hidden, weight, bias and targets must be on one device that is not meta: {where}")
    least, most = FACTORS
    if not (isfinite(head.scale) and abs(head.scale) <= most and (head.softcap == 0 or least <= head.softcap <= most)):
        raise InputError(f"scale must be finite, softcap 0 or positive, found {head.scale} and {head.softcap}")


def _shapes(hidden: Tensor, head: Projection | None, targets: Tensor) -> str:
    given = {"hidden": hidden, **({} if head is None else {"weight": head.weight, "bias": head.bias}), "targets": targets}
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items() if x is not None)


def _run(chosen: str, hidden: Tensor, head: Projection, targets: Tensor, variants: int, gradient: bool) -> reference.RowLosses:
    """Run a backend on rows that all have a target: see reference.linear_cross_entropy."""
    wide = torch.float64 in (hidden.dtype, head.weight.dtype)
    module = dispatch.implementation("linear_cross_entropy", "torch" if wide else chosen)
    with torch.autocast(hidden.device.type, enabled=False):  # the operands are cast already, and sums must stay in fp32
        found: reference.RowLosses = module.linear_cross_entropy(hidden, head, targets, variants, gradient)
    return found


def _with_targets(chosen: str, hidden: Tensor, head: Projection, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Run a backend on the rows that have a target; the others get loss and gradient 0."""
    there = (targets != IGNORE).nonzero()[:, 0]
    if len(there) == len(targets):
        found = _run(chosen, hidden.detach(), head, targets, 0, gradient)
        return found.losses, found.gradient
    found = _run(chosen, hidden.detach()[there], head, targets[there], 0, gradient)
    losses = found.losses.new_zeros(len(targets)).index_copy_(0, there, found.losses)
    grads = found.gradient.new_zeros(len(targets) if gradient else 0, hidden.shape[1])
    return losses, grads.index_copy_(0, there, found.gradient) if gradient else grads


@torch.library.custom_op("adept_fast::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return losses [rows] and their gradient to `hidden` [rows, width], both in the accumulation dtype."""
    head = Projection(weight, bias, scale, softcap)
    _require_fitting(hidden, head, targets)
    return _with_targets(dispatch.resolve("linear_cross_entropy", hidden.device, backend), hidden, head, targets, True)


@_operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(hidden)
    return hidden.new_empty(targets.shape, dtype=dtype), torch.empty_like(hidden, dtype=dtype)


# ctx is Any, as torch's type of it lacks `saved_tensors` and attributes set here.
def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0], inputs[3])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    slope, hidden, targets = ctx.saved_tensors
    losses = torch.where(targets == IGNORE, 0, losses)  # it may be NaN or inf, and 0 times that is NaN
    found = (losses[:, None] * slope).to(ctx.dtype)
    if torch.is_grad_enabled():  # create_graph=True: autograd does not know that `slope` depends on `hidden`
        found = _once(found, hidden)
    return (found, *(None,) * 6)


class _Once(torch.autograd.Function):
    """Identity whose backward raises: the gradient to `hidden` cannot be differentiated again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, found: Tensor, hidden: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor | None, ...]:
        raise InputError("linear_cross_entropy has no second derivative: use F.cross_entropy of the logits if you need one")


# torch's stub of `apply` has no annotations.
_once: Callable[[Tensor, Tensor], Tensor] = _Once.apply
_operator.register_autograd(_backward, setup_context=_save)
