"""How far an AdamW is from fp64 after some steps, and how far the formats that it keeps may take it.

Distances are root mean squares over elements, as shares of the way that the elements moved. Allowed is that of torch's fused AdamW in the
parameter's dtype, or with a master that of rounding the truth once to this dtype, times a margin; and what the format of the moments adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.adamw_setups import HYPER, multipliers

Make = Callable[[list[Parameter]], Optimizer]
MARGIN = {"ours": 1.05, "other": 1.2, "kahan": 1.2, "stochastic": 1.5}
# Of the way moved. An 8-bit code of a block is within 1/2 of 1/127 of the largest moment, a 4-bit one within 1/2 of 1/7 (1/15 unsigned).
MOMENTS = {"8 bits": 0.02, "4 bits": 0.25}
ROWS, COLUMNS, STEPS = 64, 256, 20  # the smallest tensor that all packages quantise has 4,096 elements
TINY = 1e-6


@cache
def _values(spread: bool) -> tuple[Tensor, Tensor]:
    """Return start and gradients, exact in bf16. Weights are small, so that bf16 does not round their updates away.

    spread: gradients of neighbours differ in size, by e^z with z normal, which is hard on formats that share a scale.
    """
    generator = torch.Generator().manual_seed(0)
    start, grads = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(STEPS, ROWS, COLUMNS, generator=generator) + 0.5
    sizes = torch.randn(ROWS, COLUMNS, generator=generator).exp() if spread else 1.0
    return (0.02 * start).bfloat16(), (sizes * grads).bfloat16()


def shifted(values: Tensor, by: int) -> Tensor:
    """Return a copy that begins so many elements after an aligned address."""
    return values.new_empty(values.numel() + by)[by:].view(values.shape).copy_(values)


def _after(make: Make, dtype: torch.dtype, device: torch.device, dim: int | None, spread: bool, shift: int = 0) -> Tensor:
    """Return the parameter after the steps. dim: it is cut along this dimension into a tensor for each index."""
    start, grads = (x.to(device, dtype) for x in _values(spread))
    parts = 1 if dim is None else start.shape[dim]
    params = [Parameter(shifted(part, shift)) for part in start.chunk(parts, dim or 0)]
    optimizer = make(params)
    for grad in grads:
        for param, part in zip(params, grad.chunk(parts, dim or 0), strict=True):
            param.grad = part.contiguous()
        optimizer.step()
    return torch.cat([p.detach() for p in params], dim or 0).double().cpu()


@cache
def _torchs(dtype: torch.dtype, device: torch.device, dim: int | None, spread: bool) -> Tensor:
    """Return what torch's AdamW makes of it, with a group for each index of `dim`."""

    def make(params: list[Parameter]) -> Optimizer:
        rates = [1.0] if dim is None else multipliers(len(params), torch.device("cpu")).tolist()
        groups = [{"params": [p], "lr": HYPER["lr"] * rate} for p, rate in zip(params, rates, strict=True)]
        return torch.optim.AdamW(groups, **HYPER, fused=dtype != torch.float64)

    return _after(make, dtype, device, dim, spread)


def distances(
    make: Make,
    dtype: torch.dtype,
    device: torch.device,
    margin: str,
    moments: str | None,
    master: bool = False,
    dim: int | None = None,
    shift: int = 0,
) -> dict[str, float]:
    """Return `distance` from fp64, what is `allowed`, and the distance where sizes of gradients are `spread`.

    margin, moments: keys of MARGIN and MOMENTS; None for moments that are floats. master: it keeps what the dtype rounds away.
    dim: `make` gives each index of this dimension a rate, by `multipliers`. shift: elements from an aligned address to the parameter.

    Raises AssertionError for a distance that is not allowed.
    """

    def share(found: Tensor, spread: bool = False) -> float:
        truth = _torchs(torch.float64, torch.device("cpu"), dim, spread)
        way = truth - _values(spread)[0].double()
        return ((found - truth).square().mean() / way.square().mean()).sqrt().item()

    found, spread = (_after(make, dtype, device, None, spread, shift) for spread in (False, True))
    rounded = _torchs(torch.float64, torch.device("cpu"), dim, False).to(dtype).double()
    error, least = share(found), share(rounded if master else _torchs(dtype, device, dim, False))
    allowed = MARGIN[margin] * least + (0.0 if moments is None else MOMENTS[moments]) + TINY
    assert error <= allowed, f"{error:.3g} of the way moved from fp64, allowed {allowed:.3g}"
    return {"distance": error, "allowed": allowed, "spread": share(spread, True)}
