"""Checks of AdamW's arguments: those of torch.optim.AdamW with torch's messages and order, and those that torch does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import REAL
from adept_fast.ops.adamw.masters import needs_master
from adept_fast.ops.number_formats import MODES
from adept_fast.runtime.dtensor import is_sharded
from adept_fast.settings.validation import shown

HYPERPARAMETERS, FLAGS = ("lr", "betas", "eps", "weight_decay"), ("maximize", "amsgrad", "capturable", "fused")
ROUNDED_TO_ZERO = -1e-12  # torch's CosineAnnealingLR ends a few 1e-20 below its eta_min


def check_torch_arguments(
    params: object,
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
    if not isinstance(params, Iterable):
        raise InputError(f"params must be parameters, found {shown(params)}: give model.parameters()", "params")
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not _is_number(value) and not (name == "lr" and isinstance(lr, Tensor)):
            raise InputError(f"{name} must be a number, found {shown(value)}", name)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(isinstance(beta, (Real, Tensor)) for beta in betas):
        raise InputError(f"betas must be two numbers, found {shown(betas)}", "betas")
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


def check_own_arguments(state_dtype: torch.dtype | str | None, master_weights: str | None, max_grad_norm: float | None) -> None:
    """Raise InputError for an unknown state_dtype or master_weights, or a max_grad_norm that is not positive."""
    if state_dtype not in (None, "int8", torch.int8, *REAL):
        raise InputError(f'state_dtype: {state_dtype!r} is none of "int8", {", ".join(map(str, REAL))} and None')
    if master_weights not in (None, *MODES):
        names = ", ".join(f'"{mode}"' for mode in MODES if mode)
        raise InputError(f"master_weights: {master_weights!r} is none of None, {names}")
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
        raise InputError(f"max_grad_norm: {shown(max_grad_norm)} is no positive number; None switches clipping off")


def check_hyperparameters(number: int, group: Mapping[str, Any]) -> None:
    """Raise InputError, naming group and key, if a current lr, betas, eps or weight_decay is missing, no number or out of range.

    Tensors on a GPU are not read. An lr just below 0, as a scheduler's rounding leaves it, counts as 0.
    """
    try:
        lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        if isinstance(lr, Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
            lr, beta1, beta2 = _number(lr), _number(beta1), _number(beta2)
        fine = ROUNDED_TO_ZERO < lr < inf and 0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < inf and 0 <= weight_decay < inf
    except (KeyError, TypeError, ValueError, RuntimeError):
        fine = False
    if not fine:
        raise _unfit(number, group)


def check_group(number: int, group: Mapping[str, Any]) -> None:
    """Raise InputError as check_keys and check_hyperparameters do."""
    check_keys(number, group)
    check_hyperparameters(number, group)


def check_keys(number: int, group: Mapping[str, Any]) -> None:
    """Raise InputError, naming group and keys, for a group without one of the keys that a step reads."""
    if missing := [key for key in (*HYPERPARAMETERS, *FLAGS, "params") if key not in group]:
        raise InputError(f"group {number}: has no {', '.join(missing)}: give it the keys of AdamW's groups, as an AdamW saves them")


def _unfit(number: int, group: Mapping[str, Any]) -> InputError:
    """Make the error for the first hyperparameter that is missing, not a number or out of range."""
    check_keys(number, {**dict.fromkeys((*FLAGS, "params")), **group})
    fits = {name: _in_range(group[name], ROUNDED_TO_ZERO if name == "lr" else 0, inf) for name in HYPERPARAMETERS}
    try:
        beta1, beta2 = group["betas"]
        fits["betas"] = _in_range(beta1, 0, 1) and _in_range(beta2, 0, 1)
    except (TypeError, ValueError):
        fits["betas"] = False
    name = next(name for name in HYPERPARAMETERS if not fits[name])
    what = "two numbers from 0 to below 1" if name == "betas" else "one finite number of at least 0"
    return InputError(f"group {number}: {name}={shown(group[name])} must be {what}; set it in optimizer.param_groups", name)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def _in_range(value: Any, low: float, below: float) -> bool:
    try:
        return bool(low <= _number(value) < below)
    except (TypeError, ValueError, RuntimeError):
        return False


def _number(value: float | Tensor) -> float:
    """Return the value of a number or of a tensor on the CPU; 0 for a tensor on another device, to avoid a synchronisation.

    Raises ValueError for a tensor that is not one real number.
    """
    if not isinstance(value, Tensor):
        return value
    if not _is_number(value):
        raise ValueError
    return value.item() if value.device.type == "cpu" else 0.0


def checked_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict. Raises InputError if it is not one of an optimizer."""
    parts = {"state": Mapping, "param_groups": list}
    if not isinstance(state_dict, Mapping) or not all(isinstance(state_dict.get(name), kind) for name, kind in parts.items()):
        found = f"keys: {', '.join(map(str, state_dict)) or 'none'}" if isinstance(state_dict, Mapping) else type(state_dict).__name__
        wanted = "a dict `state` and a list `param_groups`"
        raise InputError(f"state_dict: must hold {wanted} ({found}): give what optimizer.state_dict() returned")
    for number, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise InputError(f"state_dict: group {number} has no list `params`: give what optimizer.state_dict() returned")
    return state_dict


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
                f"{where}: unit_lr has {shown(position)}: {shown(given)}, no {{position below {len(group['params'])}: (multipliers, dim)}}"
            )
        multipliers, dim = given
        result[position] = checked_multipliers(group["params"][position], multipliers, dim, f"{where}, parameter {position}: unit_lr")
    return result


def check_flags(number: int, group: Mapping[str, Any], state_dtype: torch.dtype | None) -> None:
    """Raise InputError for a group that `state_dtype` does not support."""
    if state_dtype == torch.int8 and (group["amsgrad"] or group.get("differentiable")):
        raise InputError(f"group {number}: 8-bit moments are without amsgrad and differentiable; give another state_dtype")


def check_dtypes(where: str, param: Tensor, master_weights: str | None) -> None:
    """Raise InputError if `master_weights` does not support the dtype of `param`."""
    if master_weights in ("remainder", "remainder8", "stochastic") and needs_master(param) and param.dtype != torch.bfloat16:
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
        raise InputError(f"{where}: dim: {shown(dim)} is not a dimension of a parameter of shape {tuple(param.shape)}")
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
