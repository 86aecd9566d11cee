"""A hook that steps while backward runs gives the weights, moments and noise of the ordinary loop, with one gradient at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from adept_fast import AdamW
from tests.support.sharded_worker import assert_same, in_processes, mesh_of

SETUPS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"amsgrad": True}),
    (torch.bfloat16, {"master_weights": "remainder", "state_dtype": torch.float32}),
    (torch.bfloat16, {"master_weights": "kahan"}),
    (torch.bfloat16, {"master_weights": "stochastic"}),
    (torch.bfloat16, {"master_weights": "remainder8", "state_dtype": "int8"}),
]


def made(dtype: torch.dtype, options: dict[str, Any]) -> tuple[nn.Sequential, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(3))).to(dtype)
    optimizer = AdamW(model.named_parameters(), lr=3e-2, weight_decay=0.13, **options)
    optimizer.set_unit_lr("*.0.weight", torch.linspace(0, 2, 16))
    return model, optimizer


def hook(model: nn.Module, optimizer: AdamW, hooked: Iterable[nn.Parameter]) -> list[int]:
    """Step in a hook of each of `hooked`. Returns the list of how many gradients each hook finds."""
    alive: list[int] = []

    def step_and_free(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    for parameter in hooked:
        parameter.register_post_accumulate_grad_hook(step_and_free)
    return alive


def train(model: nn.Module, optimizer: AdamW, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(inputs).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def held(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The whole weights and states by name."""
    states = {f"{name} {key}": x for name, p in model.named_parameters() for key, x in optimizer.state[p].items()}
    return {name: getattr(x, "full_tensor", x.clone)() for name, x in (dict(model.named_parameters()) | states).items()}


@pytest.mark.parametrize(("dtype", "options"), SETUPS, ids=str)
@pytest.mark.parametrize("by_layer", [False, True])
def test_hooks_give_the_bits_of_the_ordinary_loop(dtype: torch.dtype, options: dict[str, Any], by_layer: bool) -> None:
    model, optimizer = made(dtype, options)
    train(model, optimizer, 0, 5)
    early, steps = made(dtype, options)
    alive = hook(early, steps, [layer[0].weight for layer in early] if by_layer else early.parameters())
    train(early, steps, 0, 3)
    assert len(alive) == 3 * (3 if by_layer else 12) and (by_layer or set(alive) == {1})
    file = io.BytesIO()
    torch.save([early.state_dict(), steps.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed, ordinary = made(dtype, options)
    resumed.load_state_dict(weights)
    ordinary.load_state_dict(state)
    train(resumed, ordinary, 3, 5)
    assert_same(held(resumed, ordinary), held(model, optimizer), options)


@pytest.mark.parametrize("tensors", [1, 9, 90])
def test_a_step_costs_about_200_python_calls_whatever_it_updates(tensors: int) -> None:
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(90)]
    optimizer, calls = AdamW(params), 0

    def count(frame: Any, event: str, given: Any) -> None:
        nonlocal calls
        calls += event == "call"

    for step in range(5):
        for p in params[:tensors]:
            p.grad = torch.ones(4, 4)
        if step == 4:
            sys.setprofile(count)
        optimizer.step()
        optimizer.zero_grad()
        sys.setprofile(None)
    assert 100 < calls < 300  # 273 with torch 2.8


def sharded() -> None:
    found = []
    for early in (False, True):
        model, optimizer = made(torch.float32, {})
        for module in (*model, model):
            fully_shard(module, mesh=mesh_of(2))
        optimizer = AdamW(model.named_parameters(), lr=3e-2)
        optimizer.set_unit_lr("*.0.weight", torch.linspace(0, 2, 16))
        alive = hook(model, optimizer, model.parameters() if early else ())
        train(model, optimizer, 0, 4)
        assert alive == [1] * 48 * early
        found.append(held(model, optimizer))
    assert_same(found[1], found[0], "hooks")


@pytest.mark.slow
def test_fsdp2_calls_the_hooks_on_reduced_gradients(tmp_path: Path) -> None:
    in_processes(2, tmp_path, sharded)
