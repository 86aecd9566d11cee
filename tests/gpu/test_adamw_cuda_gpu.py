"""The launches of the CUDA backend, on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from adept_fast.ops import dispatch
from adept_fast.ops.adamw.reference import Update, adamw_update_
from adept_fast.ops.adamw.table import Table
from adept_fast.optim import AdamW
from tests.support.adamw_cases import CHUNK, FORMATS, OPTIONS, UNITS, Case, assert_same_bits, bits, cases, compare, make, placed

pytestmark = pytest.mark.gpu


def on_gpu(updates: list[Update], scale: float | None = None, found_inf: Tensor | None = None) -> None:
    backend = pytest.importorskip("adept_fast.ops.adamw.cuda")
    device = updates[0].param.device
    backend.adamw(Table(updates), None if scale is None else torch.tensor(scale, dtype=torch.float64, device=device), found_inf)


def scaled_adamw(params: Iterable[Tensor], **changes: object) -> AdamW:
    pytest.importorskip("adept_fast._CUDA")
    options = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13, "backend": "cuda"}
    return AdamW(params, **(options | changes))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_are_found(name: str) -> None:
    assert dispatch.resolve("adamw", torch.device("cuda"), name) == name


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_launches_give_the_reference_bits(dtype: torch.dtype) -> None:
    compare(cases(dtype, UNITS), OPTIONS, on_gpu, "cuda", 0.37)
    compare(cases(dtype, ("none", "columns"))[::5], OPTIONS._replace(beta1=0.4, beta2=0.3, maximize=True), on_gpu, "cuda", 1.0)


def test_as_near_to_fp64_as_torch() -> None:
    start, grads = torch.randn(1031, 77, device="cuda"), torch.randn(20, 1031, 77, device="cuda")
    ends = []
    for dtype in (torch.float64, torch.float32, None):
        param = torch.nn.Parameter(start.to(dtype or torch.float32, copy=True))
        options = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
        opt = scaled_adamw([param]) if dtype is None else torch.optim.AdamW([param], **options)
        for grad in grads:
            param.grad = grad.to(param.dtype)
            opt.step()
        ends.append(param.detach().double())
    truth, torchs, ours = ends
    assert (ours - truth).abs().mean() <= 1.01 * (torchs - truth).abs().mean()


def test_hundreds_of_groups_of_tiny_and_empty_tensors() -> None:
    def some(number: int) -> Update:
        numel = (0, 1, 3, 8, 0, 9)[number % 6]
        generator = torch.Generator().manual_seed(number)
        options = OPTIONS._replace(lr=1e-5 * (number + 1))
        tensors = [torch.rand(numel, generator=generator) for _ in range(4)]
        return Update(*tensors, None, None, torch.tensor(3.0), None, 1, 1, 0, number, options)

    reference = [some(number) for number in range(3000)]
    ours = [placed(update, "cuda") for update in reference]
    on_gpu(ours)
    for update in reference:
        adamw_update_(update)
    assert_same_bits(ours, reference, range(3000))
    empty = [placed(some(0), "cuda")]
    on_gpu(empty)
    assert empty[0].step.item() == 4.0


def test_found_inf_changes_nothing_and_gradscaler_recovers() -> None:
    case = Case((torch.bfloat16, torch.bfloat16, torch.float32), "remainder", True, "columns", 1)
    ours, before = [placed(make(case, 3), "cuda")], [make(case, 3)]
    on_gpu(ours, 0.5, torch.ones((), device="cuda"))
    assert_same_bits(ours, before, [case])
    on_gpu(ours, 0.5, torch.zeros((), device="cuda"))
    assert not torch.equal(bits(ours[0].param), bits(before[0].param))

    param = torch.nn.Parameter(torch.full((9,), 2.0, device="cuda"))
    opt, scaler = scaled_adamw([param]), torch.amp.GradScaler("cuda", init_scale=1024.0)
    steps = []
    for factor in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
        steps.append((opt.state[param]["step"].item(), param.detach().clone()))
    assert [step for step, _ in steps] == [1.0, 1.0, 2.0]
    assert torch.equal(steps[0][1], steps[1][1]) and not torch.equal(steps[1][1], steps[2][1])


def test_a_captured_backward_and_step_replays_with_another_lr() -> None:
    def build() -> tuple[torch.nn.Linear, Tensor, AdamW]:
        torch.manual_seed(1)
        model, lr = torch.nn.Linear(77, 33, device="cuda", dtype=torch.bfloat16), torch.tensor(1e-2, device="cuda")
        opt = scaled_adamw(model.parameters(), lr=lr, capturable=True, master_weights="remainder", state_dtype=torch.float32)
        opt.set_unit_lr(model.weight, torch.linspace(0, 2, 33))
        return model, lr, opt

    def train(model: torch.nn.Linear, opt: AdamW, batch: Tensor) -> None:
        opt.zero_grad(set_to_none=True)
        model(batch).float().square().mean().backward()
        opt.step()

    inputs, lrs = torch.randn(6, 16, 77, device="cuda", dtype=torch.bfloat16), (1e-2, 1e-2, 3e-3, 0.0, 2e-2, 1e-3)
    model, lr, opt = build()
    for batch, rate in zip(inputs, lrs, strict=True):
        lr.fill_(rate)
        train(model, opt, batch)
    expected = [p.detach().clone() for p in model.parameters()]

    model, lr, opt = build()
    side, batch = torch.cuda.Stream(), inputs[0].clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(2):
            batch.copy_(inputs[number])
            train(model, opt, batch)
    torch.cuda.current_stream().wait_stream(side)
    opt.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, opt, batch)
    other_model, _, other = build()
    for number in range(2, 6):
        batch.copy_(inputs[number])
        lr.fill_(lrs[number])
        graph.replay()
        train(other_model, other, inputs[0])  # eager tables must not touch the graph's
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_steps_on_several_streams_are_repeatable() -> None:
    case = Case((torch.bfloat16, torch.bfloat16, torch.bfloat16), "stochastic", False, "more than a chunk", 0)
    streams = [torch.cuda.Stream() for _ in range(3)]
    ends = []
    for _ in range(2):
        ours = [placed(make(case, number), "cuda") for number in range(3)]
        torch.cuda.synchronize()
        for _, number in itertools.product(range(20), range(3)):
            with torch.cuda.stream(streams[number]):
                ours[number] = ours[number]._replace(grad=ours[number].grad.clone())
                on_gpu([ours[number]])
        torch.cuda.synchronize()
        ends.append([placed(update, "cpu") for update in ours])
    assert_same_bits(*ends, range(3))
    reference = [make(case, number) for number in range(3)]
    for _, update in itertools.product(range(20), reference):
        adamw_update_(update)
    assert_same_bits(ends[0], reference, range(3))


def test_tensors_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    chosen = cases(torch.bfloat16, ("rows",))[::9]
    compare(chosen, OPTIONS, on_gpu, "cuda:1", 0.37)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    ("dtype", "moments", "mode"),
    [
        (torch.bfloat16, torch.bfloat16, "stochastic"),
        (torch.bfloat16, torch.float32, "remainder"),
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.uint8, "remainder8"),
    ],
    ids=str,
)
def test_more_than_2_to_the_31_elements(dtype: torch.dtype, moments: torch.dtype, mode: str | None) -> None:
    unit = ROW if moments == torch.uint8 else 3  # the period of multipliers
    numel = 2**31 + CHUNK + 11  # with a tail
    numel -= numel % unit
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    big = large(numel, "cuda", dtype, moments, mode)
    pieces = [(first - first % unit, 960) for first in (0, 2**30, 2**31 - 500, numel - 960)]
    reference = [piece(big, first, count, "cpu") for first, count in pieces]
    on_gpu([big])
    for update in reference:
        adamw_update_(update)
    assert_same_bits([piece(big, first, count, "cuda") for first, count in pieces], reference, pieces)


ROW = 192  # of 8-bit moments: a multiple of the period with three blocks


def large(numel: int, device: str, dtype: torch.dtype, moments: torch.dtype, mode: str | None) -> Update:
    def empty(dtype: torch.dtype, count: int = numel) -> Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    param, grad = empty(dtype).normal_(), empty(dtype).normal_()
    multipliers, step = torch.tensor([0.5, 0.0, 1.5], device=device), torch.zeros((), device=device)
    master = {"remainder": torch.int16, "remainder8": torch.int8}.get(mode or "")
    kept = empty(master).random_(torch.iinfo(master).min, torch.iinfo(master).max) if master else None
    options = OPTIONS._replace(master_weights=mode)
    if moments == torch.uint8:
        codes, scales = [empty(moments).random_(2, 120) for _ in range(2)], [empty(torch.float32, numel // 64).uniform_() for _ in range(2)]
        return Update(param, grad, *codes, None, kept, step, multipliers, 3, 1, 0, 5, options, *scales, ROW)
    exp_avg, exp_avg_sq = empty(moments).normal_(), empty(moments).uniform_(0.01, 2.0)
    return Update(param, grad, exp_avg, exp_avg_sq, None, kept, step, multipliers, 3, 1, 0, 5, options)


def piece(update: Update, first: int, count: int, device: str) -> Update:
    """A copy of some elements, with the scales of their blocks."""

    def cut(name: str, x: Tensor) -> Tensor:
        each = 64 if name.endswith("_scale") else 1
        return x[first // each : (first + count) // each] if x.numel() > 3 else x

    tensors = {name: cut(name, x).to(device, copy=True) for name, x in update._asdict().items() if isinstance(x, Tensor)}
    return update._replace(**tensors, first_index=first)
