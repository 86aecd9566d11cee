"""What AdamW refuses: what torch.optim.AdamW does, in the same order and words, and its own arguments out of range."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.reference import needs_master

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what can be updated, and complex


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
    """Raise InputError (a ValueError), or RuntimeError where torch does, for arguments out of range or that exclude each other."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise InputError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise InputError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise InputError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise InputError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise InputError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay:
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
    """Raise InputError for a state_dtype, master_weights or max_grad_norm that does not exist."""
    if state_dtype not in (None, *DTYPES):
        raise InputError(f"state_dtype: {state_dtype!r} is none of {', '.join(map(str, DTYPES))} and None")
    if master_weights not in (None, "copy", "remainder", "kahan", "stochastic"):
        raise InputError(f'master_weights: {master_weights!r} is none of None, "copy", "remainder", "kahan", "stochastic"')
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm: {max_grad_norm} is not positive; None switches clipping off")


def check_dtypes(where: str, param: Tensor, master_weights: str | None) -> None:
    """Raise InputError where `master_weights` cannot serve `param`."""
    if master_weights in ("remainder", "stochastic") and needs_master(param) and param.dtype != torch.bfloat16:
        raise InputError(f"{where}: master_weights={master_weights!r} needs bfloat16, not {param.dtype}; use 'copy' or 'kahan'")


def checked_multipliers(param: Tensor, multipliers: Tensor | float, dim: int) -> tuple[Tensor, int]:
    """(fp32 copy on the parameter's device, dim counted from the front). Raises InputError where they do not fit `param`."""
    try:
        values = torch.as_tensor(multipliers).detach().to(param.device, torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"multipliers: no numbers for a parameter of shape {tuple(param.shape)} ({error})") from None
    if values.ndim == 0:
        dim = 0
    elif not isinstance(dim, int) or not -param.ndim <= dim < param.ndim:
        raise InputError(f"dim: {dim!r} is not a dimension of a parameter of shape {tuple(param.shape)}")
    else:
        dim %= param.ndim
    expected = param.shape[dim : dim + values.ndim]
    if values.shape != expected:
        raise InputError(
            f"multipliers: shape {tuple(values.shape)} from dim={dim} does not fit a parameter of shape {tuple(param.shape)}, "
            f"whose dimensions there are {tuple(expected)}"
        )
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise InputError("multipliers: every one must be finite and >= 0")
    return values, dim


def refuse_sparse(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError, in torch's words, where a gradient is sparse."""
    if any(param.grad is not None and param.grad.layout != torch.strided for param in params):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
