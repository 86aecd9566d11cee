"""AdamW against torch.optim.AdamW: results, arguments, errors and the machinery around a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.errors import InputError
from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
SHAPES = [(0,), (7, 5), (3,), (), (2, 0, 3), (3, 2, 5), (67,)]


def tensors(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = dtype if dtype.is_complex else torch.float64
    return [torch.randn(shape, generator=generator, dtype=draw).to(dtype) for shape in shapes]


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(x) for x in tensors(dtype, shapes)]


def train(optimizer: torch.optim.Optimizer, steps: int = 12, first: int = 1) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for index, p in enumerate(params):
            # Gradients of very different sizes, drawn in fp64 from (step, index) alone, so that runs in any dtype see the same ones.
            draw = torch.complex128 if p.is_complex() else torch.float64
            generator = torch.Generator().manual_seed(1000 * step + index)
            p.grad = (torch.randn(p.shape, generator=generator, dtype=draw) * 10.0 ** (index - 2)).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}, {"lr": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_results_of_torch(dtype: torch.dtype, options: dict) -> None:
    ours = train(AdamW(parameters(dtype), **HYPER | options))
    theirs = train(torch.optim.AdamW(parameters(dtype), **HYPER | options, foreach=False))
    for a, b in zip(ours, theirs, strict=True):
        bound = 8 * torch.finfo(dtype).eps  # roundings of 12 steps; a weight is of order 1
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        assert torch.equal(a, b) or options != {"lr": 0.0}


@pytest.mark.parametrize("beta1", [0.0, 0.3])
def test_short_averages_forget(beta1: float) -> None:
    """beta1 = 0 leaves nothing of the last gradient, whatever its size."""
    p = Parameter(torch.ones(5))
    optimizer = AdamW([p], lr=0.1, betas=(beta1, 0.9))
    for grad in (1e8, 1.0):
        p.grad = torch.full_like(p, grad)
        optimizer.step()
    expected = beta1 * (1 - beta1) * 1e8 + (1 - beta1)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full_like(p, expected), rtol=1e-6, atol=0)


def test_infinite_weights_stay() -> None:
    """A mask in a parameter survives weight decay: inf - inf would be no number."""
    p = Parameter(torch.tensor([float("-inf"), 1.0]))
    optimizer = AdamW([p], **HYPER)
    p.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    assert p[0] == float("-inf") and p[1] < 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_truth_than_torch(dtype: torch.dtype, fused: bool) -> None:
    shapes = [(65, 33), (33,)]
    start = [x.to(torch.float64) for x in tensors(dtype, shapes)]
    truth = train(torch.optim.AdamW([Parameter(x.clone()) for x in start], **HYPER), 40)
    ours = train(AdamW(parameters(dtype, shapes), **HYPER), 40)
    theirs = train(torch.optim.AdamW(parameters(dtype, shapes), **HYPER, fused=fused, foreach=not fused), 40)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        error, allowed = (a.double() - t).abs().mean(), (b.double() - t).abs().mean()
        assert error <= 1.02 * allowed + 1e-12
        assert allowed > 0


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_in_a_dtype_of_their_own(amsgrad: bool) -> None:
    """bf16 parameters with fp32 moments have the moments of fp32 parameters under the same gradients; bf16 moments are those rounded."""
    grads = tensors(torch.bfloat16, [(33, 5)] * 6, seed=1)
    states = {}
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, dtype, state_dtype in (("fp32", fp32, None), ("mixed", bf16, fp32), ("low", fp32, bf16)):
        p = Parameter(tensors(dtype, [(33, 5)])[0])
        optimizer = AdamW([p], **HYPER, amsgrad=amsgrad, state_dtype=state_dtype)
        for grad in grads:
            p.grad = grad.to(dtype)
            optimizer.step()
        states[name] = optimizer.state[p]
    for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
        assert states["mixed"][key].dtype == torch.float32 and torch.equal(states["mixed"][key], states["fp32"][key])
        assert states["low"][key].dtype == torch.bfloat16
        error = (states["low"][key].float() - states["fp32"][key]).abs().max() / states["fp32"][key].abs().max()
        assert 0 < error < len(grads) * 2**-8


def test_blocks_and_layouts() -> None:
    """Above 2^17 elements a step runs in blocks of rows; transposed, sliced and channels-last parameters and expanded gradients as any."""
    generator = torch.Generator().manual_seed(3)

    def build() -> list[Parameter]:
        generator.manual_seed(3)
        base = [torch.randn(shape, generator=generator) for shape in ((523, 271), (271, 523), (5, 14), (3, 5, 4, 6))]
        big, transposed, sliced, image = base
        return [Parameter(x) for x in (big, transposed.t(), sliced[:, ::2], image.to(memory_format=torch.channels_last))]

    def step_all(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> None:
        for step in range(3):
            generator.manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            params[0].grad = torch.randn(271, generator=generator).expand(523, 271)
            params[3].grad = params[3].grad.to(memory_format=torch.channels_last)
            optimizer.step()

    ours, theirs = build(), build()
    optimizer = AdamW(ours, **HYPER, amsgrad=True)
    step_all(optimizer, ours)
    step_all(torch.optim.AdamW(theirs, **HYPER, amsgrad=True, foreach=False), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=4e-7)
    assert optimizer.state[ours[3]]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_tensor_rate_and_betas_on_the_device() -> None:
    exact = {"lr": 2.0**-7, "betas": (0.875, 0.96875), "weight_decay": 0.125}
    tensor = {"lr": torch.tensor([2.0**-7]), "betas": (torch.tensor(0.875), torch.tensor([0.96875])), "weight_decay": 0.125}
    plain = train(AdamW(parameters(), **exact))
    for a, b in zip(train(AdamW(parameters(), **tensor)), plain, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(train(AdamW(parameters(), **tensor, capturable=True)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_gradients_through_a_step() -> None:
    """differentiable=True: derivatives of two steps by start, rate, betas and gradients, as torch's and as finite differences."""
    start, *grads = (x.requires_grad_() for x in tensors(torch.float64, [(4, 3)] * 3))
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.01, 0.85, 0.97)]

    def run(cls: type[torch.optim.Optimizer], amsgrad: bool, start: Tensor, lr: Tensor, *others: Tensor) -> Tensor:
        betas, grads = others[:2], others[2:]
        p = start.clone()
        optimizer = cls([p], **HYPER | {"lr": lr, "betas": betas}, differentiable=True, amsgrad=amsgrad)
        for grad in grads:
            p.grad = grad
            optimizer.step()
        return p

    inputs = (start, *scalars, *grads)
    ours, theirs = (run(cls, False, *inputs) for cls in (AdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad(p.square().sum(), inputs) for p in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: run(AdamW, True, *x), inputs)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1e-3},
        {"lr": float("nan")},
        {"lr": torch.ones(2)},
        {"lr": torch.tensor(0.1), "foreach": True},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"betas": (0.9, torch.tensor(0.9))},
        {"betas": (torch.ones(2) / 2, torch.tensor(0.9))},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    ids=str,
)
def test_errors_of_torch(bad: dict) -> None:
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.AdamW(parameters(), **bad)
    with pytest.raises(type(theirs.value)) as ours:
        AdamW(parameters(), **bad)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"state_dtype": torch.uint8}, "state_dtype"),
        ({"state_dtype": "float32"}, "state_dtype"),
        ({"state_dtype": torch.float8_e4m3fn}, "state_dtype"),
        ({"master_weights": "fp32"}, "master_weights"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
    ],
    ids=str,
)
def test_own_errors(bad: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdamW(parameters(), **bad)


def test_unknown_backend_raises_at_once_and_leaves_no_group() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        AdamW(parameters(), backend="abacus")
    optimizer = AdamW(parameters(), backend="torch")
    optimizer.backend = "abacus"
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_updated_is_named_before_anything_moves(dtype: torch.dtype) -> None:
    first, odd = Parameter(torch.ones(3)), torch.ones(4).to(dtype)
    optimizer = AdamW([first, odd], **HYPER)  # as model.parameters() of a quantised model has it
    first.grad = torch.ones(3)
    optimizer.step()
    before, odd.grad = first.clone(), torch.ones(4).to(dtype)
    with pytest.raises(InputError, match=f"group 0, parameter 1 is {dtype}"):
        optimizer.step()
    assert torch.equal(first, before)


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    first, table = Parameter(torch.ones(3)), Parameter(torch.ones(5, 2))
    optimizer = AdamW([first, table], **HYPER)
    first.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (5, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="^Adam does not support sparse gradients, please consider SparseAdam instead$"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3)) and not optimizer.state


def test_closures_hooks_groups_and_absent_gradients() -> None:
    weight, idle, late = Parameter(torch.ones(3)), Parameter(torch.ones(2)), Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [weight, idle]}, {"params": []}], **HYPER)
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.square().sum() + late.square().sum()).mul(3.0)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 21.0
    assert calls == ["before", "after"]
    assert torch.equal(idle, torch.ones(2)) and idle not in optimizer.state
    assert weight[0].item() == pytest.approx((1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"], rel=1e-6)
    assert late[0].item() == pytest.approx((1 - 0.5 * HYPER["weight_decay"]) - 0.5, rel=1e-6)
    weight.grad = late.grad = None
    assert optimizer.step() is None
