"""The factor that a step multiplies gradients by: GradScaler's scale undone, and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adept_fast.ops.adamw.op import sum_of_squares
from adept_fast.ops.adamw.reference import clip_scale
from adept_fast.optim.arguments import checked_scale
from adept_fast.runtime import dtensor


def gradient_scale(
    optimizer: Any, grads: Sequence[Tensor], meshes: Sequence[dtensor.Mesh | None], backends: Sequence[str]
) -> Tensor | None:
    """Return the factor, fp64 and 0-d; None if gradients are neither scaled nor clipped.

    optimizer: with `max_grad_norm`, and `grad_scale` if GradScaler has set it.
    grads, meshes: each gradient and the mesh that it is sharded over; read only if gradients are clipped.
    backends: those of the parameters on the CPU.
    """
    grad_scale = checked_scale("grad_scale", getattr(optimizer, "grad_scale", None), torch.float64)
    scale = None if grad_scale is None else grad_scale.reciprocal()
    if optimizer.max_grad_norm is None:
        return scale
    squares = dtensor.total(partial(sum_of_squares, backend=backends[0] if backends else "torch"), grads, meshes)
    return clip_scale(squares, optimizer.max_grad_norm, scale)
