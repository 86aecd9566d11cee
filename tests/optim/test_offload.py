"""OffloadedAdamW gives AdamW's bits, whatever happens between backward and step. The device is the CPU, with copies as late as a GPU's."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.errors import InputError
from adept_fast.optim import AdamW, OffloadedAdamW
from adept_fast.optim.host_adamw import HostAdamW
from adept_fast.optim.transfers import CpuTransfers

HYPER: dict[str, Any] = {"lr": 3e-2, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
MODES = [None, "copy", "update"]
Optimizer = torch.optim.Optimizer
Event = Callable[[AdamW, list[Parameter]], None]


class LateTransfers(CpuTransfers):
    """Copies that complete when they are waited for, as on a GPU. Until then what they write is NaN.

    held: bytes of host memory. moved: bytes copied down and up. gradients: the most gradients on the device when one is taken.
    """

    def __init__(self, params: list[Parameter]) -> None:
        self.params, self.uploads, self.read = params, [], []
        self.held, self.moved, self.gradients = 0, 0, 0

    def host_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        host = super().host_like(tensor, dtype)
        self.held += host.nbytes
        return host

    def download(self, host: Tensor, tensor: Tensor) -> Any:
        self.moved += host.nbytes
        self.gradients = max(self.gradients, sum(p.grad is not None for p in self.params))
        host.fill_(float("nan"))
        return LateCopy(host, tensor)

    def upload(self, tensor: Tensor, host: Tensor) -> None:
        assert not self.read, "uploads of the last step were not waited for"
        self.moved += host.nbytes
        tensor.fill_(float("nan"))
        self.uploads.append((tensor, host, host.clone()))

    def finish(self) -> None:
        for tensor, host, _ in self.uploads:
            tensor.data.copy_(host)
        self.read, self.uploads = self.uploads, []

    def wait_for_uploads(self) -> None:
        assert not self.uploads
        for _, host, then in self.read:
            assert torch.equal(host.nan_to_num(7), then.nan_to_num(7)), "host memory was written while an upload may have read it"
        self.read = []


class LateCopy:
    def __init__(self, host: Tensor, tensor: Tensor) -> None:
        self.host, self.tensor = host, tensor

    def synchronize(self) -> None:
        self.host.data.copy_(self.tensor)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Parameter]], LateTransfers]:
    def install(params: list[Parameter]) -> LateTransfers:
        transfers = LateTransfers(params)
        monkeypatch.setattr("adept_fast.optim.offload.transfers_of", lambda device: transfers)
        monkeypatch.setattr("adept_fast.optim.host_adamw.BUCKET", 0)
        return transfers

    return install


def parameters(*dtypes: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (12,), (3, 4, 20), (0, 2), (9, 3)]
    return [Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]


def backward(params: list[Parameter], seed: int, size: float = 1.0, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p.float() * torch.randn(p.shape, generator=generator)).sum() for p in params]
    (size * sum(term for i, term in enumerate(terms) if i not in without)).backward()


def assert_same(ours: Optimizer, params: list[Parameter], reference: Optimizer, others: list[Parameter]) -> None:
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.nan_to_num(7), q.nan_to_num(7))
    one, other = ours.state_dict(), reference.state_dict()
    assert one["state"].keys() == other["state"].keys()
    for i, state in other["state"].items():
        assert state.keys() == one["state"][i].keys()
        for key, value in state.items():
            found = one["state"][i][key]
            assert (found.dtype, found.device) == (value.dtype, value.device) if isinstance(value, Tensor) else found == value
            assert not isinstance(value, Tensor) or torch.equal(found.nan_to_num(7), value.nan_to_num(7)), f"parameter {i}: {key}"
    for group in (*one["param_groups"], *other["param_groups"]):
        group.pop("unit_lr", None)
    assert one["param_groups"] == other["param_groups"]


def set_lr(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.011


def set_rates(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.set_unit_lr(params[0], torch.tensor([0.0, 1.5, 0.3, 0.0, 2.0, 1.0, 0.1]))
    optimizer.set_unit_lr(params[4], torch.tensor([0.5, 0.0, 1.0]), dim=1)


def set_some_rates(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.set_unit_lr(params[0], torch.linspace(0, 1, 7))


def edit(optimizer: AdamW, params: list[Parameter]) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        params[1].clamp_(-0.4, 0.4)


def read_state(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.state_dict()


def drop(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.zero_grad()


def drop_and_redo(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.zero_grad()
    set_some_rates(optimizer, params)
    backward(params, 77)


def once_more(optimizer: AdamW, params: list[Parameter]) -> None:
    backward(params, 78, without=(1,))


def switch_amsgrad_on(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["amsgrad"] = True


def clip_all(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.max_grad_norm = 0.5


def replace_a_moment(optimizer: AdamW, params: list[Parameter]) -> None:
    optimizer.state[params[2]]["exp_avg"] = torch.full_like(params[2], 0.125)


def reload(optimizer: AdamW, params: list[Parameter]) -> None:
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    optimizer.load_state_dict(torch.load(saved, weights_only=True))


def add_group(optimizer: AdamW, params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(3, 2)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.02})


def close(optimizer: AdamW, params: list[Parameter]) -> None:
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.close()


BETWEEN: dict[str, Event] = {
    each.__name__: each
    for each in (
        set_lr, set_rates, set_some_rates, edit, read_state, drop, drop_and_redo, once_more, switch_amsgrad_on, clip_all, replace_a_moment,
        reload, close, add_group,
    )
}  # fmt: skip


def both(
    late: Callable[[list[Parameter]], LateTransfers], dtypes: tuple[torch.dtype, ...], in_backward: str | None, **options: Any
) -> tuple[OffloadedAdamW, list[Parameter], AdamW, list[Parameter]]:
    ours, theirs = parameters(*dtypes), parameters(*dtypes)
    late(ours)
    return OffloadedAdamW(ours, **HYPER | options, in_backward=in_backward), ours, AdamW(theirs, **HYPER | options), theirs


def ahead(optimizer: OffloadedAdamW) -> int:
    """How many updates have run ahead, after the thread has done its work."""
    optimizer._arriving.wait()
    return sum(each.ahead for each in optimizer._copies.values())


SETUPS = {
    "fp32": ((torch.float32,), {}),
    "fp32 and bf16, remainder": ((torch.bfloat16, torch.float32), {"master_weights": "remainder", "state_dtype": torch.float32}),
    "bf16, copy": ((torch.bfloat16,), {"master_weights": "copy"}),
    "bf16, kahan, amsgrad": ((torch.bfloat16,), {"master_weights": "kahan", "amsgrad": True}),
    "bf16, stochastic": ((torch.float32, torch.bfloat16), {"master_weights": "stochastic", "maximize": True}),
    "bf16, 8 bits": ((torch.bfloat16,), {"master_weights": "remainder8", "state_dtype": "int8"}),
    "plain torch": ((torch.float32, torch.float64), {"backend": "torch"}),
}


@pytest.mark.parametrize("max_grad_norm", [None, 6.0])
@pytest.mark.parametrize("in_backward", MODES)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_bits_are_those_of_adamw(setup: str, in_backward: str | None, max_grad_norm: float | None, late: Any) -> None:
    """Steps that clip and steps that do not, a schedule, frozen units, missing gradients, one pass and several, infinities."""
    dtypes, options = SETUPS[setup]
    ours, params, reference, others = both(late, dtypes, in_backward, max_grad_norm=max_grad_norm, **options)
    pairs = ((ours, params), (reference, others))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9) for optimizer, _ in pairs]
    runs_ahead = 0
    for step, (size, passes, without) in enumerate(
        [(0.1, 1, ()), (0.1, 1, ()), (9, 1, ()), (0.1, 1, (1,)), (0.1, 1, ()), (0.1, 2, ()), (0.1, 2, ()), (1e38, 1, (0,)), (0.1, 1, ())]
    ):
        for (optimizer, its), schedule in zip(pairs, schedules, strict=True):
            if step == 1:
                set_rates(optimizer, its)
            for number in range(passes):
                backward(its, 10 * step + number, size, without)
            if optimizer is ours:
                runs_ahead += ahead(ours)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert_same(ours, params, reference, others)
    assert (runs_ahead > 10) == (in_backward == "update")
    assert {each.dtype for each in params} == set(dtypes)


@pytest.mark.parametrize("in_backward", MODES)
@pytest.mark.parametrize("event", BETWEEN)
def test_what_happens_between_backward_and_step_happens_to_adamw_too(event: str, in_backward: str | None, late: Any) -> None:
    options = {"master_weights": "remainder", "max_grad_norm": 50.0}
    ours, params, reference, others = both(late, (torch.bfloat16, torch.float32), in_backward, **options)
    for step in range(7):
        for optimizer, its in ((ours, params), (reference, others)):
            backward(its, step)
            if optimizer is ours and step in (3, 5) and in_backward == "update" and event not in ("close", "clip_all"):
                assert ahead(ours)
            if step in (3, 4):
                BETWEEN[event](optimizer, its)
            optimizer.step()
            optimizer.zero_grad()
        assert_same(ours, params, reference, others)


def test_a_state_that_an_update_ahead_created_goes_with_it(late: Any) -> None:
    ours, params, reference, others = both(late, (torch.float32,), "update")
    for step in range(6):
        for optimizer, its in ((ours, params), (reference, others)):
            if step == 2:
                switch_amsgrad_on(optimizer, its)
            backward(its, step, size=100.0 if step == 2 else 0.1)
            if step == 2 and optimizer is ours:
                assert ahead(ours) == 5
            if step != 2:
                optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, params, reference, others)


def test_updates_run_ahead_once_where_steps_are_alike(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes a step and a schedule: all updates are on the thread, after the second pass. After a step that clips there is none."""
    params = parameters(torch.float32)
    late(params)
    ours = OffloadedAdamW(params, **HYPER, max_grad_norm=100.0, in_backward="update")
    schedule = torch.optim.lr_scheduler.LinearLR(ours, 0.1)
    run, updated, here = HostAdamW.update, [], threading.current_thread()

    def noted(self: HostAdamW, copies: Any, scale: Any, check_only: bool = False) -> None:
        updated.extend([] if check_only else [threading.current_thread() is here] * len(copies))
        run(self, copies, scale, check_only)

    monkeypatch.setattr(HostAdamW, "update", noted)
    in_step, on_thread = [True] * 5, [False] * 5
    steps = [(0.1, in_step), (0.1, on_thread), (0.1, on_thread), (99, on_thread + in_step), (0.1, in_step), (0.1, on_thread)]
    for step, (size, expected) in enumerate(steps):
        backward(params, 2 * step, size)
        assert ahead(ours) == 0
        backward(params, 2 * step + 1, size)
        assert ahead(ours) == (0 if expected == in_step else 5)
        ours.step()
        schedule.step()
        assert updated == expected
        updated.clear()


@pytest.mark.parametrize("in_backward", MODES)
def test_edits_between_steps_reach_the_host(in_backward: str | None, late: Any) -> None:
    ours, params, reference, others = both(late, (torch.bfloat16,), in_backward, master_weights="remainder")
    for step in range(6):
        for optimizer, its in ((ours, params), (reference, others)):
            if step in (2, 4):
                edit(optimizer, its)
            if step == 3:
                its[2].data = its[2].data * 3  # moved, as by model.to
            backward(its, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, params, reference, others)


@pytest.mark.parametrize("in_backward", MODES)
def test_a_run_goes_on_from_adamw_and_back(in_backward: str | None, late: Any) -> None:
    """AdamW, offloaded, torch.optim.AdamW in turn, each from the other's saved state, against AdamW all along."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    late(params)
    reference, saved = AdamW(others, **HYPER), None
    set_rates(reference, others)
    kinds: list[Callable[[], Any]] = [
        lambda: AdamW(params, **HYPER),
        lambda: OffloadedAdamW(params, **HYPER, in_backward=in_backward),
        lambda: AdamW(params, **HYPER),
        lambda: OffloadedAdamW(params, **HYPER, in_backward=in_backward),
    ]
    for turn, make in enumerate(kinds):
        optimizer = make()
        if saved is None:
            set_rates(optimizer, params)
        else:
            optimizer.load_state_dict(saved)
        for step in range(3):
            for each, its in ((optimizer, params), (reference, others)):
                backward(its, 10 * turn + step)
                each.step()
                each.zero_grad()
        assert_same(optimizer, params, reference, others)
        saved = copy.deepcopy(optimizer.state_dict())
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.close()
    torchs = torch.optim.AdamW(params)
    torchs.load_state_dict(saved)
    assert {state["step"].item() for state in torchs.state.values()} == {12.0}


def test_a_fresh_optimizer_takes_rates_of_parameters_without_a_state(late: Any) -> None:
    ours, params, reference, others = both(late, (torch.float32,), "update")
    for optimizer, its in ((reference, others), (ours, params)):
        set_rates(optimizer, its)
    saved = reference.state_dict()
    fresh = OffloadedAdamW(params, in_backward=None)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.unit_lr(params[0])[0], ours.unit_lr(params[0])[0])
    assert fresh.param_groups[0]["lr"] == HYPER["lr"]


def test_a_state_that_does_not_fit_changes_nothing(late: Any) -> None:
    ours, params, reference, _ = both(late, (torch.bfloat16,), "update", master_weights="remainder")
    for step in range(3):
        backward(params, step)
        ours.step()
    before = copy.deepcopy(ours.state_dict())
    bad = copy.deepcopy(before)
    bad["state"][4]["exp_avg"] = torch.zeros(2)
    with pytest.raises(InputError, match="group 0, parameter 4: exp_avg"):
        ours.load_state_dict(bad)
    backward(params, 3)
    assert ahead(ours) == 5
    weights = [p.detach().clone() for p in params]
    ours.state[params[4]]["exp_avg"] = torch.zeros(2)
    with pytest.raises(InputError, match="group 0, parameter 4: exp_avg"):
        ours.step()
    assert all(torch.equal(p, weight) for p, weight in zip(params, weights, strict=True))
    ours.load_state_dict(before)
    ours.step()
    theirs = parameters(torch.bfloat16)
    reference = AdamW(theirs, **HYPER, master_weights="remainder")
    for step in range(4):
        backward(theirs, step)
        reference.step()
        reference.zero_grad()
    assert_same(ours, params, reference, theirs)


def test_an_error_on_the_thread_is_undone_and_raised_by_step(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, params, reference, others = both(late, (torch.bfloat16,), "update", master_weights="remainder")
    run = HostAdamW.update

    def broken(self: HostAdamW, copies: Any, scale: Any, check_only: bool = False) -> None:
        run(self, copies, scale, check_only)
        if not check_only:
            raise RuntimeError("broken after writing")

    for step in range(5):
        for optimizer, its in ((ours, params), (reference, others)):
            backward(its, step)
            if optimizer is ours and step == 3:
                ours._arriving.wait()
                with monkeypatch.context() as patch:
                    patch.setattr(HostAdamW, "update", broken)
                    backward(params, 33)  # one pass more, whose update ahead fails
                    ours._arriving.wait()
                assert ahead(ours) == 0
            elif step == 3:
                backward(others, 33)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, params, reference, others)


def test_a_gradient_that_is_lost_on_its_way_is_an_error_of_step(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, params, _, _ = both(late, (torch.float32,), "copy")
    backward(params, 0)
    ours.step()
    before = [p.detach().clone() for p in params]

    def broken(self: LateCopy) -> None:
        raise RuntimeError("CUDA error: the bus fell off")

    with monkeypatch.context() as patch:
        patch.setattr(LateCopy, "synchronize", broken)
        backward(params, 1)
        with pytest.raises(RuntimeError, match="fell off"):
            ours.step()
    ours.step()  # has no gradients: they were incomplete
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert {state["step"].item() for state in ours.state.values()} == {1.0}


@pytest.mark.parametrize("in_backward", MODES)
def test_what_memory_is_held_and_what_is_moved(in_backward: str | None, late: Any) -> None:
    """Per element of bf16: device: the gradient or nothing; host: 2 + 2 pinned, 10 of state; ahead: 12 kept. 4 bytes move a step."""
    params = [Parameter(torch.randn(40, 25).bfloat16()) for _ in range(6)]
    transfers, elements = late(params), 6000
    options = {"master_weights": "remainder", "state_dtype": torch.float32}
    ours = OffloadedAdamW(params, **HYPER, **options, in_backward=in_backward)
    for step in range(3):
        moved = transfers.moved
        backward(params, step)
        runs_ahead = ahead(ours)
        ours.step()
        assert sum(p.grad is not None for p in params) == (6 if in_backward is None else 0)
        ours.zero_grad()
    assert transfers.held == 4 * elements
    assert transfers.moved - moved == 4 * elements
    assert transfers.gradients == (6 if in_backward is None else 1)
    assert sum(value.nbytes for state in ours.state.values() for key, value in state.items() if key != "step") == 10 * elements
    kept = sum(saved.nbytes for each in ours._copies.values() for key, (_, saved) in each.kept.items() if key != "step")
    assert kept == (12 * elements if in_backward == "update" else 0)
    assert runs_ahead == (6 if in_backward == "update" else 0)


def test_parameters_without_a_gradient_take_no_memory(late: Any) -> None:
    frozen, trained = Parameter(torch.ones(100), requires_grad=False), Parameter(torch.ones(10))
    transfers = late([frozen, trained])
    ours = OffloadedAdamW([frozen, trained], in_backward="update")
    trained.sum().backward()
    ours.step()
    assert transfers.held == 80


@pytest.mark.parametrize("in_backward", [None, "update"])
def test_updates_go_by_the_bucket(in_backward: str | None, late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order in step(); ahead with what has arrived, if it fills one; the rest in step()."""
    run, here = HostAdamW.update, threading.current_thread()
    sizes: dict[bool, list[int]] = {True: [], False: []}  # bytes of gradients, in step() or on the thread

    def counted(self: HostAdamW, copies: Any, scale: Any, check_only: bool = False) -> None:
        sizes[threading.current_thread() is here] += [] if check_only else [sum(each.grad.nbytes for each in copies)]
        run(self, copies, scale, check_only)

    ours, params, reference, others = both(late, (torch.float32,), in_backward)
    monkeypatch.setattr("adept_fast.optim.host_adamw.BUCKET", 100)
    monkeypatch.setattr(HostAdamW, "update", counted)
    for step in range(2):
        for optimizer, its in ((ours, params), (reference, others)):
            backward(its, step, without=(1, 2) if step else ())
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, params, reference, others)
    in_step = [140, 48 + 960, 0 + 108]
    assert sizes[True][:3] == in_step
    assert (sizes[True][3:] == [140, 108]) == (in_backward is None)
    assert sum(sizes[True][3:]) + sum(sizes[False]) == 140 + 108
    assert all(size >= 100 for size in sizes[False])


@pytest.mark.parametrize("in_backward", ["copy", "update"])
def test_random_loops_that_do_not_wait_for_the_thread(in_backward: str, late: Any) -> None:
    draw = random.Random(7)
    options = {"master_weights": "remainder", "max_grad_norm": 40.0}
    ours, params, reference, others = both(late, (torch.bfloat16, torch.float32), in_backward, **options)
    for step in range(60):
        size, passes = draw.choice([0.1, 0.1, 0.1, 3.0]), draw.choice([1, 1, 1, 2])
        lr, without = draw.choice([None, None, draw.uniform(0, 0.02)]), draw.choice([(), (), (1, 4)])
        for optimizer, its in ((ours, params), (reference, others)):
            for number in range(passes):
                backward(its, 10 * step + number, size, without)
            if lr is not None:
                optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, params, reference, others)


def test_grad_scaler_and_clipping_from_outside(late: Any) -> None:
    for fused in (None, True):
        ours, params, reference, others = both(late, (torch.float32,), None, fused=fused)
        for optimizer, its in ((ours, params), (reference, others)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
            for step in range(4):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(step)
                scaler.scale(sum((p * torch.randn(p.shape, generator=generator)).sum() for p in its)).backward()
                if step in (0, 2):
                    its[0].grad[1, 1] = float("inf")
                if step == 3:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(its, 0.2)
                scaler.step(optimizer)
                scaler.update()
        assert_same(ours, params, reference, others)


def test_grad_scaler_is_refused_where_gradients_leave_the_device(late: Any) -> None:
    for unscale in (False, True):
        ours, params, _, _ = both(late, (torch.float32,), "copy")
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(params[0].sum()).backward()
        if unscale:
            scaler.unscale_(ours)
        with pytest.raises(InputError, match="in_backward: GradScaler .*: leave it out"):
            scaler.step(ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_backward": "step"}, "in_backward: .*step.* is none of"),
        ({"capturable": True}, "capturable: .* leave it out"),
        ({"differentiable": True}, "differentiable: .* leave it out"),
        ({"lr": -1}, "Invalid learning rate"),
        ({"master_weights": "remainder"}, "needs bfloat16"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OffloadedAdamW([Parameter(torch.ones(2, dtype=torch.float16))], **options)


def test_what_is_refused(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="not from meta"):
        OffloadedAdamW([Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(RuntimeError, match="backend='triton'|backend='cuda'"):
        OffloadedAdamW([Parameter(torch.ones(2))], backend="cuda")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="params: DTensors .* CPUOffloadPolicy"):
        patch.setattr("adept_fast.optim.offload.is_sharded", lambda tensor: True)
        OffloadedAdamW([Parameter(torch.ones(2))])
    ours, params, _, _ = both(late, (torch.float32,), "update")
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="save its state_dict"):
            attempt(ours)
    with monkeypatch.context() as patch:
        patch.setattr("adept_fast.runtime.distributed.active", lambda: True)
        with pytest.raises(InputError, match="in_backward: several processes"):
            backward(params, 0)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    sparse = OffloadedAdamW(embedding.parameters(), in_backward="copy")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        sparse.step()
    changed = Parameter(torch.ones(3))
    optimizer = OffloadedAdamW([changed])
    changed.sum().backward()
    optimizer.step()
    changed.data, changed.grad = changed.data.double(), None
    changed.sum().backward()
    with pytest.raises(InputError, match=r"torch.float32 and shape \(3,\) is torch.float64"):
        optimizer.step()


def threads() -> int:
    return sum(thread.name.startswith("OffloadedAdamW") for thread in threading.enumerate())


def test_closing_ends_the_thread_and_the_hooks(late: Any) -> None:
    before = threads()
    ours, params, _, _ = both(late, (torch.float32,), "update")
    backward(params, 0)
    assert threads() == before + 1
    ours.close()
    assert threads() == before
    backward(params, 1)
    assert all(p.grad is not None for p in params)
    ours.close()


def test_a_dropped_optimizer_leaves_gradients_alone(late: Any) -> None:
    ours, params, _, _ = both(late, (torch.float32,), "update")
    backward(params, 0)
    ours.step()
    gone = ref(ours)
    del ours
    gc.collect()
    assert gone() is None
    backward(params, 1)
    assert all(p.grad is not None for p in params)


def test_closures_and_step_hooks(late: Any) -> None:
    ours, params, _, _ = both(late, (torch.float32,), "copy")
    called: list[str] = []
    ours.register_step_post_hook(lambda *_: called.append("after"))
    ours.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))

    def closure() -> float:
        backward(params, 0)
        return 3.0

    assert ours.step(closure) == 3.0
    ours.load_state_dict(ours.state_dict())
    assert called == ["after", "loaded"]
    assert {state["step"].item() for state in ours.state.values()} == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("in_backward", MODES)
def test_a_loop_of_accelerate_that_accumulates(in_backward: str | None) -> None:
    accelerate = pytest.importorskip("accelerate")
    ends = []
    for make in (AdamW, OffloadedAdamW):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(0)
        options = {"in_backward": in_backward} if make is OffloadedAdamW else {}
        model = torch.nn.Linear(8, 4)
        optimizer = make(model.parameters(), **HYPER, max_grad_norm=1.0, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        for _ in range(12):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(4, 8)).square().sum() * 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.nightly
def test_a_compiled_step_runs_without_a_graph() -> None:
    param, other = (Parameter(torch.ones(8, 4)) for _ in range(2))
    ours, reference = OffloadedAdamW([param], in_backward="update"), AdamW([other])
    step = torch.compile(ours.step)
    for factor in range(3):
        (factor * param).sum().backward()
        (factor * other).sum().backward()
        step()
        reference.step()
        other.grad = None
    assert_same(ours, [param], reference, [other])


@pytest.fixture(params=MODES)
def on_gpu(request: pytest.FixtureRequest) -> tuple[OffloadedAdamW, list[Parameter]]:
    params = [Parameter(p.detach().cuda()) for p in parameters(torch.bfloat16, torch.float32)]
    options = {"master_weights": "remainder", "max_grad_norm": 1e9}  # which runs the code of clipping, and clips nothing
    return OffloadedAdamW(params, **HYPER, **options, in_backward=request.param), params


@pytest.mark.gpu
def test_on_a_gpu(on_gpu: tuple[OffloadedAdamW, list[Parameter]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adept_fast.optim.host_adamw.BUCKET", 1)
    ours, params = on_gpu
    others = parameters(torch.bfloat16, torch.float32)
    reference = AdamW(others, **HYPER, master_weights="remainder")
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(p.shape, generator=generator) for p in others]
        for optimizer, its in ((ours, params), (reference, others)):
            sum((p.float() * g.to(p.device)).sum() for p, g in zip(its, gradients, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, [p.cpu() for p in params], reference, others)
