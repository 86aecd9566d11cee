"""Runs of ours and of torch's AdamW that are changed on the way, for the families of cases about the optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.ops import dispatch
from adept_fast.optim import AdamW
from tests.crash.case import Case

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
SHAPES = ((4, 4), (8, 64), (100, 64), (256, 33), (7,), (1,), (), (0, 3), (3, 2, 5))
BACKENDS = tuple(name for name in ("cpu", "torch", "triton") if dispatch.status()[name].found)
Change = Callable[[torch.optim.Optimizer, Parameter], None]


class Setting(NamedTuple):
    """What a run starts from: the parameter that is changed, another beside it, and the optimizer's options."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    options: Mapping[str, Any]
    own: Mapping[str, Any]  # options that torch's does not have

    def parameters(self) -> list[Parameter]:
        generator = torch.Generator().manual_seed(self.seed)
        params = [Parameter(torch.randn(shape, generator=generator).to(self.dtype)) for shape in (self.shape, (5, 3))]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(self.dtype)
        return params

    def optimizer(self, ours: bool, backend: str | None = None) -> tuple[torch.optim.Optimizer, list[Parameter]]:
        params = self.parameters()
        if ours:
            return AdamW(params, **HYPER, **self.options, **self.own, backend=backend), params
        return torch.optim.AdamW(params, **HYPER, **self.options, foreach=False), params

    def run(self, change: Change, ours: bool, backend: str | None = None, after: int = 2) -> list[Tensor]:
        """Four steps, with a change after some of them: the parameters and their moments."""
        optimizer, params = self.optimizer(ours, backend)
        for step in range(1, 5):
            optimizer.step()
            if step == after:
                change(optimizer, params[0])
        return results(optimizer, params)

    def right(self, change: Change, after: int = 2) -> list[Tensor]:
        """Torch's numbers, or those of our plain formula where torch rounds otherwise."""
        return self.run(change, True, "torch", after) if self.dtype == torch.bfloat16 else self.run(change, False, after=after)


def results(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> list[Tensor]:
    kept = [optimizer.state[param][key] for param in params for key in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in (*params, *kept)]


def drawn(draw: random.Random, low: bool = True) -> Setting:
    """low: also bf16, with the ways to keep what it rounds away, where torch's numbers are others."""
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16) if low else (torch.float32, torch.float64))
    own: dict[str, Any] = {}
    if dtype == torch.bfloat16:
        own["master_weights"] = draw.choice((None, "copy", "remainder", "kahan", "stochastic"))
        own["state_dtype"] = draw.choice((None, torch.float32))
    options = {"amsgrad": draw.random() < 0.3, "maximize": draw.random() < 0.3}
    return Setting(draw.choice(SHAPES), dtype, draw.randrange(10_000), options, own)


def backend_for(draw: random.Random, setting: Setting) -> str:
    return draw.choice([name for name in BACKENDS if name != "triton" or setting.dtype != torch.float64])


def refused() -> list[Tensor]:
    """As `expected`: no numbers would be right."""
    raise ValueError("the tensors are no longer there, or hold something else")


def changed_run(
    setting: Setting, backend: str, name: str, change: Change, right: Callable[[], list[Tensor]] | None = None, **more: Any
) -> Case:
    """Ours through `change`, against the right numbers of the same one."""
    right = right or partial(setting.right, change)
    return Case(f"{name}; {setting}, backend {backend}", lambda: setting.run(change, True, backend), right, **more)
