"""AdamW on PyTorch's own inputs for its AdamW, and on parameters and gradients of unusual form.

The former are every configuration, scheduler and error that torch's optimizer tests go through, from
torch.testing._internal.common_optimizers, which needs expecttest. Configurations that torch keeps for GPUs (capturable, tensor betas) run
here on every backend; torch.optim.AdamW, the measure, then runs without `capturable`, which it refuses on CPU tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adept_fast.ops.dispatch import IMPLEMENTED, resolve
from adept_fast.optim import AdamW

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="expecttest is not installed")

ADAM, ADAMW = (next(info for info in common.optim_db if info.optim_cls is cls) for cls in (torch.optim.Adam, torch.optim.AdamW))
SCHEDULERS = [*ADAMW.scheduler_inputs, *ADAM.scheduler_inputs]
SHAPES = [(), (0, 3), (37,), (41, 23), (3, 5, 7)]
WIDE = {torch.complex64: torch.complex128}  # every other dtype: fp64
HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}

Run = tuple[dict[str, Tensor], list[float]]


def configurations(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Keywords by description, made anew: schedulers write to a rate that is a tensor."""
    return {x.desc: x.kwargs for device in ("cpu", "mps", "cuda") for x in ADAMW.optim_inputs_func(device, dtype)}


def with_flags() -> dict[str, dict[str, Any]]:
    """The same with one of foreach, fused and differentiable set, or none; without dtype, so eps is not the one for fp16."""
    everything = [x for device in ("cpu", "cuda") for x in common._get_optim_inputs_including_global_cliquey_kwargs(device, None, ADAMW)]
    return {x.desc: x.kwargs for x in everything}


def running() -> tuple[dict[str, str], dict[str, str]]:
    """Of AdamW's backends: {name: device} of those that run on this machine, {name: reason} of the others."""
    found, missing = {}, {}
    for name in IMPLEMENTED["adamw"]:
        for device in ("cuda", "cpu"):
            try:
                found[resolve("adamw", torch.device(device), name)] = device
            except RuntimeError as error:
                missing[name] = str(error)
    return found, {name: reason for name, reason in missing.items() if name not in found}


RUNNING, MISSING = running()
FP32 = ("cuda", "triton")  # these leave fp64 to plain torch
on_every_backend = pytest.mark.parametrize("backend", RUNNING)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, dtype=WIDE.get(dtype, torch.float64))).to(dtype)


def run(
    make: Callable[..., torch.optim.Optimizer],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    wide: bool = False,
    steps: int = 7,
    schedulers: Sequence[Callable[[torch.optim.Optimizer], LRScheduler]] = (),
) -> Run:
    """All parameters and states after some steps, and the rate of each step. `wide`: the same numbers, computed in fp64."""

    def own(shape: tuple[int, ...], seed: int, size: float = 1.0) -> Tensor:
        return draw(*shape, seed=seed, dtype=dtype, size=size).to(device, WIDE.get(dtype, torch.float64) if wide else dtype)

    params = [own(shape, index) for index, shape in enumerate(SHAPES)]
    if not kwargs.get("differentiable"):
        params = [Parameter(p) for p in params]
    if wide:
        # differentiable would keep the bias corrections in fp32.
        kwargs = {key: _doubled(value) for key, value in kwargs.items()} | {"differentiable": False, "fused": False}
    optimizer = make(params, **kwargs)
    chain, rates = [make_scheduler(optimizer) for make_scheduler in schedulers], []
    for step in range(steps):
        for index, p in enumerate(params):
            # No gradients at all in one step; one parameter frozen in two others.
            absent = step == 2 or (index == 3 and step in (3, 4))
            p.grad = None if absent else own(SHAPES[index], 100 * step + 10 + index, 10.0 ** (index / 2 - 1))
        optimizer.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        for scheduler in chain:
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    results = {"param": params}
    for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if kwargs.get("amsgrad") else [])):
        results[key] = [optimizer.state[p][key] for p in params]
    assert {optimizer.state[p]["step"].item() for p in params} == {steps - 1.0, steps - 3.0}
    return {key: torch.cat([x.detach().cpu().flatten() for x in values]) for key, values in results.items()}, rates


def _doubled(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_doubled(x) for x in value)
    return value.double() if isinstance(value, Tensor) else value


def as_torch_takes_it(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """bf16 and fp16 are measured against torch's fused form, which computes in fp32 as here. Its plain loop rounds every operation, and is
    nearer to the truth by luck (4 % in bf16) where lr is about half a unit in the last place, so that decay decides what is rounded up."""
    low = {"fused": True, "differentiable": False} if dtype in (torch.bfloat16, torch.float16) else {}
    return kwargs | {"capturable": False, "foreach": False} | low


def assert_no_further_from_truth(ours: Run, theirs: Run, truth: Run) -> None:
    """exp_avg has room: torch's lerp on CPUs is a fused multiply-add, which the same bits on every backend rule out here."""
    assert ours[1] == theirs[1]
    for key, true in truth[0].items():
        assert ours[0][key].dtype == theirs[0][key].dtype
        error, allowed = ((x[0][key].to(true.dtype) - true).abs().mean() for x in (ours, theirs))
        assert error <= (1.4 if key == "exp_avg" else 1.02) * allowed + 4e-16 * true.abs().mean(), (key, error.item(), allowed.item())


@pytest.mark.parametrize("backend", IMPLEMENTED["adamw"])
def test_backends_that_run_here(backend: str) -> None:
    if backend in MISSING:
        pytest.skip(MISSING[backend])
    assert AdamW([Parameter(torch.ones(2, device=RUNNING[backend]))], backend=backend).param_groups[0]["lr"] == 1e-3


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("configuration", configurations(torch.float32))
def test_configurations(configuration: str, dtype: torch.dtype, backend: str) -> None:
    if backend in FP32 and dtype == torch.float64:
        pytest.skip(f"{backend} leaves float64 to plain torch")

    def result(make: Callable[..., torch.optim.Optimizer], measured: bool, **options: Any) -> Run:
        kwargs = configurations(dtype)[configuration]
        return run(make, as_torch_takes_it(kwargs, dtype) if measured else kwargs, dtype, **options)

    ours = result(lambda params, **kwargs: AdamW(params, **kwargs, backend=backend), False, device=RUNNING[backend])
    theirs, truth = (result(torch.optim.AdamW, True, wide=wide) for wide in (False, True))
    assert_no_further_from_truth(ours, theirs, truth)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", with_flags())
def test_configurations_with_flags(configuration: str, dtype: torch.dtype, backend: str) -> None:
    kwargs = with_flags()[configuration]
    ours = run(lambda params, **kwargs: AdamW(params, **kwargs, backend=backend), kwargs, dtype, device=RUNNING[backend])
    kwargs = as_torch_takes_it(with_flags()[configuration], dtype)
    theirs, truth = (run(torch.optim.AdamW, kwargs, dtype, wide=wide) for wide in (False, True))
    assert_no_further_from_truth(ours, theirs, truth)


@on_every_backend
@pytest.mark.parametrize("schedulers", SCHEDULERS, ids=lambda schedulers: f"schedulers_{SCHEDULERS.index(schedulers)}")
@pytest.mark.parametrize("configuration", ["amsgrad", "Tensor lr"])
def test_schedulers(configuration: str, schedulers: list[Callable], backend: str) -> None:

    def result(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Run:
        kwargs = configurations(torch.float32)[configuration] | {"foreach": False}
        return run(make, kwargs, torch.float32, steps=13, schedulers=schedulers, **options)

    ours = result(lambda params, **kwargs: AdamW(params, **kwargs, backend=backend), device=RUNNING[backend])
    theirs, truth = (result(torch.optim.AdamW, wide=wide) for wide in (False, True))
    assert_no_further_from_truth(ours, theirs, truth)
    assert len(set(ours[1])) > 1


@on_every_backend
@pytest.mark.parametrize("schedulers", [[], *SCHEDULERS], ids=lambda schedulers: f"{len(schedulers)}_schedulers")
@pytest.mark.parametrize("configuration", configurations(torch.float32))
def test_loss_goes_the_right_way(configuration: str, schedulers: list[Callable], backend: str) -> None:
    kwargs = configurations(torch.float32)[configuration]
    weight, bias, x = (draw(*shape).to(RUNNING[backend]) for shape in ((10, 5, 2), (10,), (5,)))
    weight, bias = Parameter(weight[..., 0]), Parameter(bias)
    optimizer = AdamW([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs, backend=backend)
    chain = [make_scheduler(optimizer) for make_scheduler in schedulers]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in chain:
            scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
    last = closure().item()
    assert last > first if kwargs.get("maximize") else last < first


@on_every_backend
@pytest.mark.parametrize("configuration", configurations(torch.float32))
def test_8_bit_moments_go_with_torch_or_are_refused(configuration: str, backend: str) -> None:
    """Within 10 % of the way that torch's parameters go: a code of exp_avg is within 3 % of its value, and moments of 8 bits average."""

    def end(cls: type[torch.optim.Optimizer], device: str, **options: Any) -> list[Tensor]:
        params = [Parameter(draw(*shape, seed=i).to(device)) for i, shape in enumerate(SHAPES)]
        optimizer = cls(params, **configurations(torch.float32)[configuration] | options)
        for step in range(7):
            for i, p in enumerate(params):
                p.grad = draw(*p.shape, seed=10 * step + i).to(device)
            optimizer.step()
        assert cls is not AdamW or [*optimizer.state[params[3]]][1] == "exp_avg_8bit"
        return [p.detach().cpu() for p in params]

    given, options = configurations(torch.float32)[configuration], {"state_dtype": "int8", "backend": backend}
    if given.get("amsgrad") or given.get("differentiable"):
        with pytest.raises(ValueError, match="8-bit moments are without amsgrad and differentiable"):
            end(AdamW, RUNNING[backend], **options)
        return
    theirs = end(torch.optim.AdamW, "cpu", capturable=False, foreach=False)
    for i, (p, q) in enumerate(zip(end(AdamW, RUNNING[backend], **options), theirs, strict=True)):
        assert (p - q).abs().sum() <= 0.1 * (q - draw(*q.shape, seed=i)).abs().sum(), i


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ERRORS = [x for device in DEVICES for x in ADAMW.optim_error_inputs_func(device, torch.float32)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.optimizer_error_input.desc)
def test_errors(error: Any) -> None:
    """The same error as torch's, of the same type, with its message; construction only, as all of AdamW's error inputs are."""
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    params = [Parameter(torch.ones(2))] if params is None else params
    assert error.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR
    caught = []
    for cls in (torch.optim.AdamW, AdamW):
        with warnings.catch_warnings(), pytest.raises(error.error_type, match=error.error_regex) as raised:
            warnings.simplefilter("error")
            cls(params, **kwargs)
        caught.append(raised.value)
    assert isinstance(caught[1], type(caught[0])) and str(caught[0]) in str(caught[1])


@on_every_backend
@pytest.mark.parametrize("shapes", [[(0,), (3,)], [(3,), (2, 0)], [(0,)], [(0, 3), (0,)], [(3,), (), (0,), (5,)]], ids=str)
def test_parameters_without_elements(shapes: list[tuple[int, ...]], backend: str) -> None:
    def build(cls: type[torch.optim.Optimizer], device: str, **options: Any) -> tuple[torch.optim.Optimizer, list[Parameter]]:
        params = [Parameter(draw(*shape, seed=i).to(device)) for i, shape in enumerate(shapes)]
        return cls(params, **HYPER, amsgrad=True, **options), params

    (ours, params), (theirs, wanted) = build(AdamW, RUNNING[backend], backend=backend), build(torch.optim.AdamW, "cpu")
    for step in range(5):
        for p, q in zip(params, wanted, strict=True):
            q.grad = draw(*p.shape, seed=10 + step)
            p.grad = q.grad.to(p.device)
        ours.step()
        theirs.step()
    for p, q in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=2e-6, atol=1e-7)
    assert [ours.state[p]["step"].item() for p in params] == [5.0] * len(shapes)
    ours.load_state_dict(ours.state_dict())


@on_every_backend
def test_absent_and_zero_gradients(backend: str) -> None:
    idle, decayed, integers = (x.to(RUNNING[backend]) for x in (draw(3), draw(4), torch.tensor([1, 2])))
    optimizer = AdamW([Parameter(idle), decayed, integers], **HYPER, backend=backend)
    assert optimizer.step() is None and not optimizer.state
    decayed.grad = torch.zeros_like(decayed)
    optimizer.step()
    assert torch.equal(idle.cpu(), draw(3)) and integers.tolist() == [1, 2] and list(optimizer.state) == [decayed]
    torch.testing.assert_close(decayed.cpu(), draw(4) * (1 - HYPER["lr"] * HYPER["weight_decay"]), rtol=2e-7, atol=0)
    optimizer.zero_grad(set_to_none=False)
    assert idle.grad is None and decayed.grad.tolist() == [0.0] * 4
    optimizer.zero_grad()
    assert decayed.grad is None


@on_every_backend
def test_layouts_change_no_bit_and_touch_no_neighbour(backend: str) -> None:
    """Parameters that are strided views of one buffer, with gradients of other strides, expanded and offset ones among them."""
    buffer = draw(1000).to(RUNNING[backend])
    start, used = buffer.clone(), torch.zeros(1000, dtype=torch.bool)

    def views(x: Tensor) -> list[Tensor]:
        return [x[3:38].view(5, 7).t(), x[100:160].view(5, 12)[:, ::3], x[200:320:2].view(3, 4, 5).transpose(0, 2), x[501:508]]

    for view in views(used):
        view.fill_(True)
    strided = [Parameter(view) for view in views(buffer)]
    plain = [Parameter(view.clone(memory_format=torch.contiguous_format)) for view in strided]
    ours, dense = (AdamW(params, **HYPER, amsgrad=True, backend=backend) for params in (strided, plain))
    for step in range(4):
        grads = [draw(7).unsqueeze(1).expand(7, 5), draw(4, 5, seed=step).t(), draw(5, 4, 3, seed=step), draw(21, seed=step)[1::3]]
        for p, q, grad in zip(strided, plain, grads, strict=True):
            p.grad, q.grad = grad.to(p.device), grad.to(p.device).clone(memory_format=torch.contiguous_format)
        ours.step()
        dense.step()
    for p, q in zip(strided, plain, strict=True):
        assert torch.equal(p, q)
    moved = (buffer != start).cpu()
    assert torch.equal(moved, used)


@on_every_backend
def test_mixed_dtypes_in_one_group_are_as_alone(backend: str) -> None:
    dtypes = [torch.bfloat16, torch.complex64, torch.float16, torch.float32, torch.bfloat16]
    dtypes += [] if backend in FP32 else [torch.float64]

    def run_some(chosen: list[int]) -> list[Tensor]:
        params = [Parameter(draw(5, 3, seed=i, dtype=dtypes[i]).to(RUNNING[backend])) for i in chosen]
        optimizer = AdamW(params, **HYPER | {"eps": 1e-4}, amsgrad=True, backend=backend)
        for step in range(5):
            for i, p in zip(chosen, params, strict=True):
                p.grad = draw(5, 3, seed=10 * step + i, dtype=dtypes[i]).to(p.device)
            optimizer.step()
        return [p.detach().cpu() for p in params]

    together = run_some(list(range(len(dtypes))))
    assert [p.dtype for p in together] == dtypes
    for index, p in enumerate(together):
        assert torch.equal(p, run_some([index])[0]) and not torch.equal(p, draw(5, 3, seed=index, dtype=dtypes[index]))


@on_every_backend
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_gradients_of_another_dtype_are_used_as_they_are(param: torch.dtype, grad: torch.dtype, backend: str) -> None:
    """As widened to fp32. A parameter takes such gradients where grad_dtype is None (torch 2.9); earlier ones cannot hold them."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("Tensor.grad_dtype came with torch 2.9")
    p, q = (Parameter(draw(13, 7, dtype=param).to(RUNNING[backend], dtype)) for dtype in (param, torch.float32))
    p.grad_dtype = None
    mixed, wide = AdamW([p], **HYPER, state_dtype=torch.float32, backend=backend), AdamW([q], **HYPER, backend=backend)
    for step in range(3):
        p.grad = draw(13, 7, seed=step + 1, dtype=grad).to(p.device)
        q.grad = p.grad.float()
        mixed.step()
        wide.step()
        assert p.grad.dtype == grad and torch.equal(p, q.to(param))
        q.data.copy_(p)
    for key, value in wide.state[q].items():
        assert torch.equal(mixed.state[p][key], value)


@on_every_backend
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"max_grad_norm": 0.5}], ids=str)
def test_complex_parameters_are_pairs_of_reals(options: dict[str, Any], backend: str) -> None:
    start = draw(5, 3, dtype=torch.complex64).to(RUNNING[backend])
    whole, pairs, real, imag = (Parameter(x.clone()) for x in (start, torch.view_as_real(start), start.real, start.imag))
    optimizers = [AdamW(params, **HYPER, **options, backend=backend) for params in ([whole], [pairs], [real, imag])]
    for step in range(4):
        grad = draw(5, 3, seed=step + 1, dtype=torch.complex64).to(start.device)
        # A lazily conjugated gradient lies in memory unconjugated.
        whole.grad = grad.conj().resolve_conj().conj() if step % 2 else grad
        pairs.grad, real.grad, imag.grad = torch.view_as_real(grad), grad.real.clone(), grad.imag.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(whole), pairs) and torch.equal(pairs[..., 0], real) and torch.equal(pairs[..., 1], imag)
