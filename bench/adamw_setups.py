"""What AdamW is benchmarked on: set-ups of dtypes and masters, the shapes of a language model, its units, random values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

HYPER = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
Shapes = list[tuple[int, ...]]


class Setup(NamedTuple):
    """Dtype of parameters and gradients, that of moments, and the master.

    floor: bytes a parameter that a step must read and write. A fp32 copy is compared with its parameter, which is therefore read too.
    against: the set-up whose step is timed in the same rounds.
    """

    dtype: torch.dtype
    state_dtype: torch.dtype | str | None
    master_weights: str | None
    floor: float
    against: str | None = None

    @property
    def options(self) -> dict[str, object]:
        return {"state_dtype": self.state_dtype, "master_weights": self.master_weights}


SCALES = 2 * 4 / 64  # bytes a parameter: of two moments, fp32, one for 64 elements
SETUPS = {
    "fp32": Setup(torch.float32, None, None, 28),
    "bf16": Setup(torch.bfloat16, None, None, 14),
    "bf16 fp32-moments": Setup(torch.bfloat16, torch.float32, None, 22),
    "bf16 int8-moments": Setup(torch.bfloat16, "int8", None, 10 + 2 * SCALES, "bf16 fp32-moments"),
    "bf16 int8-moments remainder8": Setup(torch.bfloat16, "int8", "remainder8", 12 + 2 * SCALES, "bf16 fp32-moments remainder"),
    "bf16 fp32-moments remainder": Setup(torch.bfloat16, torch.float32, "remainder", 26),
    "bf16 stochastic": Setup(torch.bfloat16, None, "stochastic", 14),
    "fp32 int8-moments": Setup(torch.float32, "int8", None, 16 + 2 * SCALES, "fp32"),
    "bf16 fp32-moments copy": Setup(torch.bfloat16, torch.float32, "copy", 30),
    "bf16 kahan": Setup(torch.bfloat16, None, "kahan", 18),
    "bf16 one tensor": Setup(torch.bfloat16, None, None, 14),
}


def shapes_of(name: str, scale: int) -> Shapes:
    """Return the shapes of a set-up's parameters. At scale 1 the "one tensor" has more than 2^31 elements."""
    return [(2**20 // scale + 5, 2048 // scale)] if name.endswith("one tensor") else llama_1b(scale)


def llama_1b(scale: int) -> Shapes:
    """Return the shapes of Llama 3.2 1B's parameters, widths and vocabulary divided by `scale`."""
    hidden, inner, keys, vocabulary = 2048 // scale, 8192 // scale, 512 // scale, 128256 // scale
    projections = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    return [(vocabulary, hidden), *(projections + 2 * [(hidden,)]) * 16, (hidden,)]


def blocks(shapes: Shapes, units: int) -> list[list[int]]:
    """Return the rows of each unit: vectors are one unit each, matrices are cut into nearly equal blocks of rows so that all units are
    `units`."""
    matrices = [i for i, shape in enumerate(shapes) if len(shape) > 1]
    each, more = divmod(units - (len(shapes) - len(matrices)), len(matrices))
    parts = dict.fromkeys(range(len(shapes)), 1) | {i: each + (order < more) for order, i in enumerate(matrices)}
    return [[shape[0] // parts[i] + (j < shape[0] % parts[i]) for j in range(parts[i])] for i, shape in enumerate(shapes)]


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """Return random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device).to(dtype)
    return params


def multipliers(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0.1, 1.9, count, device=device)
