"""Plans of updates: kept while they hold, dropped for whatever changes between two steps."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.errors import InputError
from adept_fast.ops.adamw.reference import Update
from adept_fast.optim import AdamW

SHAPES = ((5, 7), (3, 4, 2), (11,))


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def give_gradient_of_another_dtype(param: Parameter, grad: Tensor) -> None:
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = None
        param.grad = grad
    else:  # older releases of torch refuse to assign it
        param.grad.data = grad


def moved(opt: AdamW) -> None:
    first = opt.param_groups[0]["params"][0]
    first.data = first.data.clone()


def transposed(opt: AdamW) -> None:
    first = opt.param_groups[0]["params"][0]
    first.data = first.data.t().contiguous().t()


def narrower_gradient(opt: AdamW) -> None:
    first = opt.param_groups[0]["params"][0]
    give_gradient_of_another_dtype(first, first.grad.to(torch.bfloat16))


def wider_gradient(opt: AdamW) -> None:
    first = opt.param_groups[0]["params"][0]
    give_gradient_of_another_dtype(first, first.grad.double() / 3)


def gradient_in_another_order(opt: AdamW) -> None:
    first = opt.param_groups[0]["params"][0]
    first.grad = first.grad.t().contiguous().t()


def without_a_gradient(opt: AdamW) -> None:
    opt.param_groups[0]["params"][1].grad = None


def rates(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], torch.linspace(0.2, 1.8, 5))


def other_rates(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], torch.linspace(1.5, 0.1, 5))


def column_rates(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], torch.linspace(0.0, 1.8, 7), dim=1)


def rates_of_elements(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], torch.linspace(0.1, 1.9, 35).view(7, 5).t())


def other_rates_of_elements(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], torch.linspace(1.9, 0.1, 35).view(7, 5).t())


def no_rates(opt: AdamW) -> None:
    opt.set_unit_lr(opt.param_groups[0]["params"][0], None)


def amsgrad(opt: AdamW) -> None:
    opt.param_groups[0]["amsgrad"] = True


def another_rate(opt: AdamW) -> None:
    opt.param_groups[0]["lr"] = torch.tensor(0.05)


def another_moment(opt: AdamW) -> None:
    state = opt.state[opt.param_groups[0]["params"][0]]
    state["exp_avg"] = 2 * state["exp_avg"]


def moment_in_place(opt: AdamW) -> None:
    state = opt.state[opt.param_groups[0]["params"][0]]
    state["exp_avg_sq"].data = 2 * state["exp_avg_sq"]


def in_another_order(opt: AdamW, key: str) -> None:
    state = opt.state[opt.param_groups[0]["params"][0]]
    if key in state:
        state[key] = state[key].t().contiguous().t()


def moment_in_another_order(opt: AdamW) -> None:
    in_another_order(opt, "exp_avg")


def second_moment_in_another_order(opt: AdamW) -> None:
    in_another_order(opt, "exp_avg_sq")


def largest_moment_in_another_order(opt: AdamW) -> None:
    in_another_order(opt, "max_exp_avg_sq")


def step_as_another_tensor(opt: AdamW) -> None:
    state = opt.state[opt.param_groups[0]["params"][0]]
    state["step"] = state["step"] + 3


def plain_backend(opt: AdamW) -> None:
    opt.backend = "torch"


def reloaded(opt: AdamW) -> None:
    opt.load_state_dict(opt.state_dict())


def another_group(opt: AdamW) -> None:
    added = Parameter(torch.full((6,), 0.5))
    added.grad = torch.linspace(-1.0, 1.0, 6)
    opt.add_param_group({"params": [added], "lr": 0.1})


def swapped(opt: AdamW) -> None:
    params = opt.param_groups[0]["params"]
    other = Parameter(params[0].detach().clone())
    other.grad, opt.state[other] = params[0].grad, opt.state.pop(params[0])
    params[0] = other


CHANGES = [
    moved, transposed, narrower_gradient, wider_gradient, gradient_in_another_order, without_a_gradient, rates, other_rates,
    column_rates, rates_of_elements, other_rates_of_elements, no_rates, amsgrad, another_rate, another_moment, moment_in_place,
    moment_in_another_order, second_moment_in_another_order, largest_moment_in_another_order, step_as_another_tensor,
    plain_backend, reloaded, another_group, swapped,
]  # fmt: skip


@pytest.mark.parametrize("first", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_steps_do_what_they_do_without_plans(first: Callable[[AdamW], None]) -> None:
    """Every change after every other, against an optimizer that forgets its plans before each step."""
    for second in CHANGES:
        ends = []
        for forgets in (False, True):
            params = parameters()
            opt = AdamW(params, lr=0.02, weight_decay=0.1, betas=(0.8, 0.95))
            for step, change in enumerate((None, None, first, second, None)):
                give_gradients(params, step)
                if change is not None:
                    change(opt)
                if forgets:
                    opt._collector.known = [None] * len(opt._collector.known)
                opt.step()
            ends.append([tensor.detach() for group in opt.param_groups for param in group["params"] for tensor in _kept(opt, param)])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), (first.__name__, second.__name__)


def _kept(opt: AdamW, param: Tensor) -> list[Tensor]:
    return [param, *(value for value in opt.state[param].values() if isinstance(value, Tensor))]


def stepped(params: list[Parameter], **options: object) -> AdamW:
    """An optimizer whose plans are made, with gradients for the next step."""
    opt = AdamW(params, **{"lr": 0.02, "weight_decay": 0.1, **options})
    for step in range(3):
        give_gradients(params, step)
        if step < 2:
            opt.step()
    return opt


def test_a_plan_knows_the_master_the_mode_and_the_device_that_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.bfloat16)
    opt = stepped(params, master_weights="copy")
    kept = opt.state[params[0]]["master"].clone()
    opt.state[params[0]]["master"] = kept.t().contiguous().t()
    opt.step()
    other = parameters(torch.bfloat16)
    stepped(other, master_weights="copy").step()
    assert all(map(torch.equal, params, other)) and not torch.equal(opt.state[params[0]]["master"], kept)

    params = parameters()
    opt = stepped(params, master_weights="copy")
    params[0].data = params[0].data.to(torch.bfloat16)
    opt.step()
    assert opt.state[params[0]].keys() - opt.state[params[1]].keys() == {"master"}

    params = parameters(torch.bfloat16)
    opt = stepped(params)
    opt.master_weights = "kahan"
    opt.step()
    assert all("compensation" in opt.state[param] for param in params)
    updates: list[Update] = []
    give_gradient_of_another_dtype(params[0], params[0].grad.double())
    with monkeypatch.context() as patch:
        patch.setattr("adept_fast.optim.adamw.launch", lambda backend, given, *scales: updates.extend(given.updates))
        opt.step()
    assert {update.grad.dtype for update in updates} == {torch.float32, torch.bfloat16}
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "no such backend")
    with pytest.raises(InputError, match="no such backend"):
        opt.step()


def test_what_no_longer_fits_is_refused_though_it_was_planned() -> None:
    params = parameters()
    opt = stepped(params)
    opt.set_unit_lr(params[0], torch.linspace(0.5, 1.5, 5))
    opt.step()
    for tensor in (params[0], params[0].grad, *(value for key, value in opt.state[params[0]].items() if key != "step")):
        tensor.data = tensor.data[:4]
    with pytest.raises(InputError, match="no longer fit"):
        opt.step()
    for params in (parameters(), [Parameter(torch.tensor(0.5))]):  # without strides, too
        opt = stepped(params)
        params[0].grad = params[0].grad.to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            opt.step()


def test_random_bits_go_by_the_place_among_all_parameters() -> None:
    """Of stochastic rounding: two groups draw what one does; after a parameter has left, as if it had never been there."""
    start, grad = (torch.randn(5000, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    ends = []
    for groups in ([4], [1, 3], [2, 2]):
        params = [Parameter(start.clone()) for _ in range(4)]
        made = iter(params)
        opt = AdamW([{"params": [next(made) for _ in range(size)]} for size in groups], lr=1e-3, master_weights="stochastic")
        for param in params:
            param.grad = grad
        opt.step()
        ends.append([param.detach().clone() for param in params])
        if groups == [1, 3]:
            opt.add_param_group({"params": [Parameter(start.clone())]})
            late = opt.param_groups[2]["params"][0]
            late.grad = grad
            for drop in (False, True):
                late.data.copy_(start)
                for tensor in opt.state[late].values():
                    tensor.zero_()
                if drop:
                    del opt.param_groups[1]["params"][0]
                opt.step()
                ends.append([late.detach().clone()])
    one, two, four, three, again = ends
    assert all(map(torch.equal, one, two)) and all(map(torch.equal, one, again))
    assert len({tuple(param.tolist()) for param in one}) == 4 and torch.equal(three[0], one[3]) and not torch.equal(four[0], one[3])


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("mode", ["remainder", "kahan"])
def test_an_edit_resets_what_a_plan_would_keep(mode: str, idle: bool) -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params, lr=1e-4, master_weights=mode)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    before = [_kept(opt, param)[-1].clone() for param in params]
    with torch.no_grad():
        params[0].mul_(2)
    for group in opt.param_groups:
        group["lr"] = 0.0
    if idle:
        give_gradients(params, 8)
        params[0].grad = None
        opt.step()
    give_gradients(params, 9)
    opt.step()
    after = [_kept(opt, param)[-1] for param in params]
    assert before[0].count_nonzero() > 0 and after[0].count_nonzero() == 0
    assert torch.equal(before[1], after[1]) and before[1].count_nonzero() > 0


def test_plans_hold_from_the_second_step_on_and_keep_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    opt = AdamW(params)
    give_gradients(params, 0)
    opt.step()
    described = []
    monkeypatch.setattr("adept_fast.optim.update_collection.operands_of", lambda *arguments: described.append(arguments))
    give_gradients(params, 1)
    gone = [weakref.ref(param.grad) for param in params]
    opt.step()
    opt.zero_grad(set_to_none=True)
    assert described == [] and all(reference() is None for reference in gone)


def test_plans_keep_no_state_that_was_moved_away() -> None:
    params = parameters()
    opt = AdamW(params)
    for step in range(2):
        give_gradients(params, step)
        opt.step()
    held = [weakref.ref(opt.state[param]["exp_avg"]) for param in params]
    for param in params:
        opt.state[param]["exp_avg"] = opt.state[param]["exp_avg"].clone()
    assert all(reference() is None for reference in held)
    gone = weakref.ref(params[0])
    opt.param_groups[0]["params"] = params[1:]
    del opt.state[params.pop(0)], param
    assert gone() is None


REMOVED = [("max_exp_avg_sq", {"amsgrad": True}), ("master", {"master_weights": "copy"}), ("remainder", {})]


@pytest.mark.parametrize(("key", "options"), REMOVED)
def test_a_state_tensor_that_was_removed_starts_again(key: str, options: dict[str, object]) -> None:
    ends = []
    for fresh in (False, True):
        params = parameters(torch.bfloat16)
        opt = AdamW(params, lr=1e-2, **{"master_weights": "remainder"} | options)
        for step in range(4):
            give_gradients(params, step)
            if step == 2:
                moved(opt)
            if step == 3:
                for state in opt.state.values():
                    del state[key]
            if step == 3 and fresh:
                opt = copy.deepcopy(opt)
                params = opt.param_groups[0]["params"]
                give_gradients(params, step)
            opt.step()
        ends.append([*params, *(opt.state[param][key] for param in params)])
    assert all(map(torch.equal, *ends))
