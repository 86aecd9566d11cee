"""Enums of csrc/descriptor.h: Format, the dtypes, and Master, the master modes."""

from __future__ import annotations

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
MODES = {None: 0, "copy": 1, "remainder": 2, "kahan": 3, "stochastic": 4}
