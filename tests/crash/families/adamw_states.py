"""AdamW on states of another shape, dtype, device or parameter: loaded, or put into the optimizer between two steps."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.optim import AdamW
from tests.crash.case import Case

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
SHAPES = ((4, 4), (8, 64), (100, 64), (256, 33), (7,), (1,), (), (0, 3), (3, 2, 5))
BACKENDS = ("cpu", "torch", "triton")


def parameter(shape: tuple[int, ...], seed: int) -> Parameter:
    generator = torch.Generator().manual_seed(seed)
    param = Parameter(torch.randn(shape, generator=generator))
    param.grad = torch.randn(shape, generator=generator)
    return param


def loaded_shapes(draw: random.Random) -> Case:
    backend, seed = draw.choice(BACKENDS), draw.randrange(1000)
    saved, into = draw.choice(SHAPES), draw.choice(SHAPES)

    def steps(cls: type[torch.optim.Optimizer], **options: object) -> list[Tensor]:
        source, target = parameter(saved, seed), parameter(into, seed + 1)
        first, second = cls([source], **HYPER, **options), cls([target], **HYPER, **options)
        first.step()
        second.load_state_dict(first.state_dict())
        second.step()
        second.step()
        return [target.detach(), second.state[target]["exp_avg_sq"]]

    return Case(
        f"a state of shape {saved} loaded into {into}, backend {backend}, seed {seed}",
        lambda: steps(AdamW, backend=backend),
        lambda: steps(torch.optim.AdamW, foreach=False),
        valid=saved == into,
    )


FAMILIES = (loaded_shapes,)
