"""torch.compile(fullgraph=True) of a step: one graph, the bits of the eager step, rates that are set later seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter

from adept_fast.optim import AdamW

pytestmark = pytest.mark.slow

SETUPS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.bfloat16, {"master_weights": "remainder", "max_grad_norm": 0.5}),
    (torch.bfloat16, {"master_weights": "copy", "amsgrad": True, "lr": torch.tensor(1e-2), "state_dtype": torch.float32}),
    (torch.bfloat16, {"master_weights": "remainder8", "state_dtype": "int8"}),
]


def run(dtype: torch.dtype, options: dict[str, Any], compiler: str | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 70), (3,), (0, 20))]
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}], weight_decay=0.1, **options)
    optimizer.set_unit_lr(params[0], torch.rand(5, generator=generator))
    step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
    for number in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if number == 2:
            optimizer.set_unit_lr(params[0], torch.rand(5, generator=generator))
        step()
    return [*params, *optimizer.state[params[0]].values()]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("dtype", "options"), SETUPS, ids=str)
def test_compiled_step_equals_eager(dtype: torch.dtype, options: dict[str, Any], compiler: str) -> None:
    pytest.importorskip("adept_fast._C", reason="the C++ extension was not built")
    for a, b in zip(run(dtype, options, compiler), run(dtype, options, None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), 1e-2], ids=["tensor", "number"])
def test_a_schedule_of_a_tensor_compiles_one_graph(lr: float | torch.Tensor) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    parameter = Parameter(torch.ones(3))
    optimizer = AdamW([parameter], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    @torch.compile(backend=counter)
    def step() -> None:
        optimizer.step()

    for _ in range(4):
        parameter.grad = torch.ones(3)
        step()
        schedule.step()
    assert (counter.frame_count == 1) == isinstance(lr, torch.Tensor)
