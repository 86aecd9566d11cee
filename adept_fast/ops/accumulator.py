"""The accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return fp64 if a tensor is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
