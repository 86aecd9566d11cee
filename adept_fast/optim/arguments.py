"""Checks of AdamW's arguments: those of torch.optim.AdamW with torch's messages and order, and those that torch does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import REAL
from adept_fast.ops.adamw.reference import needs_master
from adept_fast.runtime.dtensor import is_sharded

ROUNDED_TO_ZERO = -1e-12  # torch's CosineAnnealingLR ends a few 1e-20 below its eta_min


def check_torch_arguments(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    foreach: bool | None,
    fused: bool | None,
    capturable: bool,
    differentiable: bool,
) -> None:
    """Raise InputError (RuntimeError if torch raises that) for arguments out of range or that exclude each other."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise InputError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise InputError("Tensor lr must be 1-element")
    if not 0.0 <= lr < inf:
        raise InputError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps < inf:
        raise InputError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise InputError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay < inf:
        raise InputError(f"Invalid weight_decay value: {weight_decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise InputError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if foreach and not capturable:
                raise InputError(f"betas[{index}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise InputError(f"Tensor betas[{index}] must be 1-element")
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_own_arguments(state_dtype: torch.dtype | None, master_weights: str | None, max_grad_norm: float | None) -> None:
    """Raise InputError for an unknown state_dtype or master_weights, or a max_grad_norm that is not positive."""
    if state_dtype not in (None, *REAL):
        raise InputError(f"state_dtype: {state_dtype!r} is none of {', '.join(map(str, REAL))} and None")
    if master_weights not in (None, "copy", "remainder", "kahan", "stochastic"):
        raise InputError(f'master_weights: {master_weights!r} is none of None, "copy", "remainder", "kahan", "stochastic"')
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm: {max_grad_norm} is not positive; None switches clipping off")


def check_hyperparameters(number: int, group: Mapping[str, Any]) -> None:
    """Raise InputError if a group's current lr, betas, eps or weight_decay is out of range.

    Tensors on a GPU are not read. An lr just below 0, as a scheduler's rounding leaves it, counts as 0.
    """
    lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        lr, beta1, beta2 = (_number(number, name, value) for name, value in (("lr", lr), ("betas", beta1), ("betas", beta2)))
    try:
        fine = ROUNDED_TO_ZERO < lr < inf and 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < inf and 0 <= weight_decay < inf
    except TypeError:
        fine = False
    if not fine:
        raise InputError(
            f"group {number}: lr={lr}, betas={(beta1, beta2)}, eps={eps}, weight_decay={weight_decay}: all must be finite and >= 0, "
            "betas below 1; set them in optimizer.param_groups"
        )


def _number(number: int, name: str, value: float | Tensor) -> float:
    """Return the value of a number or of a tensor on the CPU; 0 for a tensor on another device, to avoid a synchronisation."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.is_complex():
        raise InputError(f"group {number}: {name} is a tensor of {value.dtype} and shape {tuple(value.shape)}; it must be one real number")
    return value.item() if value.device.type == "cpu" else 0.0


def checked_scale(name: str, value: Tensor | float | None, dtype: torch.dtype) -> Tensor | None:
    """Convert GradScaler's `grad_scale` or `found_inf` to 0-d of `dtype`. Raises InputError unless it is one real number."""
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1 or tensor.is_complex():
        raise InputError(f"{name}: a tensor of {tensor.dtype} and shape {tuple(tensor.shape)}; GradScaler gives one real number")
    return tensor.reshape(()).to(dtype)


def checked_rates(where: str, group: Mapping[str, Any], rates: object) -> dict[int, tuple[Tensor, int]]:
    """Copy a group's `unit_lr`, {position: (multipliers, dim)}, to its parameters' devices. Raises InputError if one does not fit."""
    if not isinstance(rates, Mapping):
        raise InputError(f"{where}: unit_lr is a {type(rates).__name__}, not {{position: (multipliers, dim)}}")
    result = {}
    for position, given in rates.items():
        there = isinstance(position, int) and 0 <= position < len(group["params"])
        if not there or not isinstance(given, tuple | list) or len(given) != 2:
            raise InputError(
                f"{where}: unit_lr has {position!r}: {given!r}; it must be {{position below {len(group['params'])}: (multipliers, dim)}}"
            )
        multipliers, dim = given
        result[position] = checked_multipliers(group["params"][position], multipliers, dim, f"{where}, parameter {position}: unit_lr")
    return result


def check_dtypes(where: str, param: Tensor, master_weights: str | None) -> None:
    """Raise InputError if `master_weights` does not support the dtype of `param`."""
    if master_weights in ("remainder", "stochastic") and needs_master(param) and param.dtype != torch.bfloat16:
        raise InputError(f"{where}: master_weights={master_weights!r} needs bfloat16, not {param.dtype}; use 'copy' or 'kahan'")


def checked_multipliers(param: Tensor, multipliers: Tensor | float, dim: int, where: str = "multipliers") -> tuple[Tensor, int]:
    """Return (fp32 copy on the parameter's device, non-negative dim). Raises InputError if they do not fit `param`."""
    try:
        given = torch.as_tensor(multipliers)
        if given.is_complex() or given.layout != torch.strided or is_sharded(given):
            raise TypeError(f"{type(given).__name__} of {given.dtype}, {given.layout}")
        if not bool(((given >= 0) & (given.detach().float() < inf)).all()):
            raise InputError(f"{where}: every multiplier must be finite and >= 0")
        values = given.detach().to(param.device, torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not numbers for a parameter of shape {tuple(param.shape)} ({error})") from None
    if values.ndim == 0:
        dim = 0
    elif not isinstance(dim, int) or not -param.ndim <= dim < param.ndim:
        raise InputError(f"{where}: dim: {dim!r} is not a dimension of a parameter of shape {tuple(param.shape)}")
    else:
        dim %= param.ndim
    expected = param.shape[dim : dim + values.ndim]
    if values.shape != expected:
        raise InputError(
            f"{where}: shape {tuple(values.shape)} from dim={dim} does not fit a parameter of shape {tuple(param.shape)}, "
            f"whose dimensions there are {tuple(expected)}"
        )
    return values, dim


def refuse_sparse(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError with torch's message if a gradient is sparse."""
    if any(param.grad is not None and param.grad.layout != torch.strided for param in params):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
