"""Dtypes of accumulation, and the enums of csrc/descriptor.h: Format, the dtypes, and Master, the master modes."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.uint8: 4}
MODES = {None: 0, "copy": 1, "remainder": 2, "kahan": 3, "stochastic": 4, "remainder8": 5}


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of accumulation: fp64 if a tensor is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
