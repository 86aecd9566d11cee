"""200 steps against fp64: no backend is further from the truth than torch's fused AdamW in the same dtypes, and masters are far nearer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.ops import dispatch as backends
from adept_fast.ops.adamw.masters import join_master
from adept_fast.optim import AdamW

HYPER = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPE = (37, 129)
STEPS = 200
BACKENDS = [name for name in ("cpu", "torch") if backends.status()[name].found]


@cache
def draw(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).bfloat16()


def run(cls: type[torch.optim.Optimizer], dtype: torch.dtype, **options: object) -> tuple[Tensor, dict]:
    """Values and gradients are exact in every dtype that runs are compared in."""
    p = Parameter(draw(0).to(dtype, copy=True))
    optimizer = cls([p], **HYPER, **options)
    for step in range(1, STEPS + 1):
        p.grad = (draw(step) + 0.5).to(dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


@cache
def truth(**options: object) -> Tensor:
    return run(torch.optim.AdamW, torch.float64, **options)[0]


def error(value: Tensor, **options: object) -> float:
    return float((value.double() - truth(**options)).abs().mean())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_further_than_torch_fused(backend: str, dtype: torch.dtype, options: dict) -> None:
    ours = error(run(AdamW, dtype, backend=backend, **options)[0], **options)
    theirs = error(run(torch.optim.AdamW, dtype, fused=True, **options)[0], **options)
    assert 0 < ours <= 1.005 * theirs


def held(p: Tensor, state: dict) -> Tensor:
    """What the mode holds the parameter to be."""
    if "master" in state:
        return state["master"]
    return join_master(p, state["remainder"]) if "remainder" in state else p.double() + state["compensation"].double()


@pytest.mark.parametrize("mode", ["copy", "remainder", "kahan"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_are_100_times_nearer_than_plain_bf16(backend: str, mode: str) -> None:
    plain = error(run(AdamW, torch.bfloat16, backend=backend, state_dtype=torch.float32)[0])
    mastered = error(held(*run(AdamW, torch.bfloat16, backend=backend, state_dtype=torch.float32, master_weights=mode)))
    assert 100 * mastered < plain


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased(backend: str) -> None:
    """Over elements, the mean signed error after 200 steps is within three standard errors of 0."""
    p, _ = run(AdamW, torch.bfloat16, backend=backend, state_dtype=torch.float32, master_weights="stochastic")
    signed = (p.double() - truth()).flatten()
    assert signed.mean().abs() < 3 * signed.std() / signed.numel() ** 0.5
    plain = (run(AdamW, torch.bfloat16, backend=backend, state_dtype=torch.float32)[0].double() - truth()).flatten()
    assert plain.mean().abs() > 3 * plain.std() / plain.numel() ** 0.5
