"""What torch.optim.AdamW refuses, refused here in the same order and words."""

from __future__ import annotations

from torch import Tensor

from adept_fast.errors import InputError


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
