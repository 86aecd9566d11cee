"""Refuse losses and tensors that are not finite, naming the item and the likely cause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.runtime.dtensor import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_finite(model: PreTrainedModel, losses: Tensor, what: str) -> None:
    """Raise InputError for the first loss of items [n] that is not finite, with `what`, its index and the likely cause."""
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong):
        raise InputError(f"{what} {int(wrong[0, 0])} is not finite: {likely_cause(model)}")


@torch.no_grad()
def require_finite_tensors(named: Iterable[tuple[str, Tensor]], where: str, way_out: str) -> None:
    """Raise InputError for the first tensor that holds NaN or infinity. Of a sharded tensor only this process's part is read."""
    for name, tensor in named:
        values = local(tensor.detach())
        if values.is_floating_point() and not values.is_meta and not bool(values.isfinite().all()):
            raise InputError(f"{where}: {name} holds NaN or infinity: {way_out}")


@torch.no_grad()
def likely_cause(model: PreTrainedModel) -> str:
    """Explain why a loss of this model is not finite: a parameter is not, or activations overflow the dtype."""
    for name, parameter in model.named_parameters():
        values = local(parameter.detach())
        if not values.is_meta and not bool(values.isfinite().all()):
            kind = "NaN" if bool(values.isnan().any()) else "infinity"
            return f"{name} holds {kind}: load the model again, or fetch it again"
    if model.dtype == torch.float16:
        return "its weights are finite, but float16 overflows above 65504: take dtype bfloat16 or float32"
    found = f"its weights are finite, so what it computes from them overflows in {str(model.dtype).removeprefix('torch.')}"
    return found if model.dtype in (torch.float32, torch.float64) else f"{found}: try float32"
