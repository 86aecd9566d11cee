"""Tensors that no longer go with their parameter, and numbers out of range: refused by name, at a load and at a step, by every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.errors import InputError
from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
NAN, INF = float("nan"), float("inf")


def stepped(shape: tuple[int, ...] = (8, 6), dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdamW, Parameter]:
    """Two groups, whose updates are planned; the parameter looked at is the second of group 1."""
    params = [Parameter(torch.linspace(-1, 1, 6)), Parameter(torch.linspace(2, 1, 3))]
    params.append(Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).to(dtype)))
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:]}], **HYPER | options)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer, params[2]


def tensors(optimizer: AdamW) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [tensor.detach().clone() for param in params for tensor in (param, *optimizer.state[param].values())]


@pytest.mark.parametrize("saved", [(4, 4), (100, 64), (2048, 6), (6, 8), (48,), (8, 6, 1)], ids=str)
def test_a_state_of_another_shape_is_refused_at_the_load_which_leaves_all_as_it_was(saved: tuple[int, ...]) -> None:
    (optimizer, param), (source, _) = stepped(), stepped(saved)
    optimizer.set_unit_lr(param, torch.linspace(0.5, 1.5, 8))
    before, groups = tensors(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(InputError) as refused:
        optimizer.load_state_dict(source.state_dict())
    assert str(refused.value).startswith(f"group 1, parameter 1: exp_avg has shape {saved}, its parameter (8, 6);")
    assert all(map(torch.equal, tensors(optimizer), before)) and optimizer.state_dict()["param_groups"] == groups
    assert torch.equal(optimizer.unit_lr(param)[0], torch.linspace(0.5, 1.5, 8))
    optimizer.step()
    assert not torch.equal(param, before[-6]) and all(tensor.isfinite().all() for tensor in tensors(optimizer))


LOADS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "exp_avg_sq gone": (lambda s, g: s.pop("exp_avg_sq"), "but no exp_avg_sq"),
    "another optimizer's": (lambda s, g: [s.clear(), s.update(momentum_buffer=torch.ones(8, 6))], "momentum_buffer but no step"),
    "on meta": (lambda s, g: s.update(exp_avg=torch.ones(8, 6, device="meta")), "exp_avg is on meta"),
    "complex": (lambda s, g: s.update(exp_avg=torch.ones(8, 6) + 0j), "exp_avg is torch.complex64"),
    "step below 0": (lambda s, g: s.update(step=torch.tensor(-1.0)), "step is -1.0"),
    "two steps": (lambda s, g: s.update(step=torch.ones(2)), "step is torch.float32 of shape"),
    "rates NaN": (lambda s, g: s.update(unit_lr=torch.full((8,), NAN), unit_dim=0), "unit_lr: every multiplier must be finite"),
    "rates too few": (lambda s, g: s.update(unit_lr=torch.ones(3), unit_dim=0), r"unit_lr: shape \(3,\) from dim=0"),
    "rates of no dimension": (lambda s, g: s.update(unit_lr=torch.ones(8), unit_dim=4), "unit_lr: dim: 4"),
    "rates that wait, below 0": (lambda s, g: g.update(unit_lr={1: (torch.full((8,), -1.0), 0)}), "unit_lr: every multiplier"),
    "rates that wait for nothing": (lambda s, g: g.update(unit_lr={7: (torch.ones(8), 0)}), "unit_lr has 7"),
    "lr infinite": (lambda s, g: g.update(lr=INF), "lr=inf must be one finite number of at least 0"),
    "weight_decay NaN": (lambda s, g: g.update(weight_decay=NAN), "weight_decay=nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_a_damaged_state_is_refused_at_the_load_by_its_place(name: str) -> None:
    damage, said = LOADS[name]
    optimizer, _ = stepped()
    before, saved = tensors(optimizer), copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][2], saved["param_groups"][1])
    with pytest.raises(InputError, match=f"^group 1.*{said}"):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, tensors(optimizer), before)) and optimizer.param_groups[1]["lr"] == HYPER["lr"]


def _entry(key: str, other: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], Parameter], None]:
    return lambda state, param: state.update({key: other(state[key])})


def _under(key: str, other: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], Parameter], None]:
    def change(state: dict[str, Any], param: Parameter) -> None:
        tensor = {"param": param, "grad": param.grad, **state}[key]
        tensor.data = other(tensor.data)

    return change


def _cut(key: str) -> Callable[[dict[str, Any], Parameter], None]:
    return lambda state, param: {"param": param, "grad": param.grad, **state}[key].untyped_storage().resize_(8)


CHANGES: dict[str, tuple[Callable[[dict[str, Any], Parameter], object], str]] = {
    "exp_avg shorter": (_entry("exp_avg", lambda x: x[:3].clone()), r"exp_avg has shape \(3, 6\), its parameter \(8, 6\)"),
    "exp_avg shorter under it": (_under("exp_avg", lambda x: x[:3]), r"exp_avg has shape \(3, 6\), its parameter \(8, 6\)"),
    "exp_avg bf16": (_entry("exp_avg", lambda x: x.bfloat16()), "exp_avg_sq is torch.float32, and must be bfloat16"),
    "exp_avg_sq bf16 under it": (_under("exp_avg_sq", lambda x: x.bfloat16()), "exp_avg_sq is torch.bfloat16, and must be float32"),
    "exp_avg on meta": (_entry("exp_avg", lambda x: x.to("meta")), "exp_avg is on meta"),
    "exp_avg_sq gone": (lambda state, param: state.pop("exp_avg_sq"), "has step, exp_avg but no exp_avg_sq"),
    "exp_avg a number": (lambda state, param: state.update(exp_avg=1.0), "exp_avg is a float"),
    "step int64": (_entry("step", lambda x: x.long()), "step is torch.int64"),
    "step int64 under it": (_under("step", lambda x: x.long()), "step is torch.int64"),
    "step below 0": (_entry("step", lambda x: x - 5), "step is -3.0"),
    "parameter larger": (_under("param", lambda x: torch.ones(90, 6)), r"exp_avg has shape \(8, 6\), its parameter \(90, 6\)"),
    "gradient shorter": (_under("grad", lambda x: x[:4]), r"gradient has shape \(4, 6\), its parameter \(8, 6\)"),
    "gradient cut": (_cut("grad"), r"gradient of shape \(8, 6\) needs 48 elements, its storage has 2"),
    "exp_avg cut": (_cut("exp_avg"), r"exp_avg of shape \(8, 6\) needs 48 elements, its storage has 2"),
    "parameter cut": (_cut("param"), r"parameter of shape \(8, 6\) needs 48 elements, its storage has 2"),
    "parameter expanded": (_under("param", lambda x: torch.ones(1, 6).expand(8, 6)), "elements of parameter share memory"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_no_longer_fit_are_refused_though_the_step_was_planned(name: str, backend: str) -> None:
    change, said = CHANGES[name]
    optimizer, param = stepped(backend=backend)
    others = [tensor for tensor in tensors(optimizer)[:8]]
    change(optimizer.state[param], param)
    for _ in range(2):
        with pytest.raises(InputError, match=f"^group 1, parameter 1: .*{said}"):
            optimizer.step()
        assert all(map(torch.equal, tensors_of_others(optimizer, param), others))


def tensors_of_others(optimizer: AdamW, param: Parameter) -> list[Tensor]:
    others = [other for group in optimizer.param_groups for other in group["params"] if other is not param]
    return [tensor for other in others for tensor in (other, *optimizer.state[other].values())]


MASTERS = [("copy", "master", torch.float64), ("remainder", "remainder", torch.int32), ("kahan", "compensation", torch.float32)]
MASTERS.append(("remainder8", "remainder8", torch.int16))


@pytest.mark.parametrize(("mode", "key", "wrong"), MASTERS)
def test_a_master_of_another_dtype_or_shape_is_refused(mode: str, key: str, wrong: torch.dtype) -> None:
    for other, said in ((lambda x: x.to(wrong), f"master is {wrong}"), (lambda x: x[:2], r"master has shape \(2, 6\)")):
        optimizer, param = stepped(dtype=torch.bfloat16, master_weights=mode)
        optimizer.state[param][key] = other(optimizer.state[param][key])
        with pytest.raises(InputError, match=f"group 1, parameter 1: .*{said}"):
            optimizer.step()


OUT_OF_RANGE = [{"lr": INF}, {"lr": NAN}, {"lr": -0.1}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": NAN}]
OUT_OF_RANGE.append({"weight_decay": -0.1})


@pytest.mark.parametrize("change", OUT_OF_RANGE, ids=str)
def test_hyperparameters_out_of_range_are_refused_whenever_they_are_set(change: dict[str, Any]) -> None:
    """A negative weight_decay or lr, too, whose sign marks frozen units in native code."""
    with pytest.raises(InputError):
        AdamW([Parameter(torch.ones(2))], **HYPER | change)
    with pytest.raises(InputError, match="^group 0"):
        AdamW([{"params": [Parameter(torch.ones(2))], **change}], **HYPER)
    optimizer, param = stepped()
    before = tensors(optimizer)
    optimizer.param_groups[1].update(change)
    with pytest.raises(InputError, match="^group 1: "):
        optimizer.step()
    assert all(map(torch.equal, tensors(optimizer), before))


BOTH, ONE = "must be two numbers from 0 to below 1", "must be one finite number of at least 0"
SET: list[tuple[dict[str, Any], str]] = [
    ({"betas": (0.9,)}, rf"betas=\(0.9,\) {BOTH}"),
    ({"betas": None}, f"betas=None {BOTH}"),
    ({"betas": 0.9}, f"betas=0.9 {BOTH}"),
    ({"betas": ("a", "b")}, rf"betas=\('a', 'b'\) {BOTH}"),
    ({"betas": (torch.ones(2), 0.9)}, f"betas=.* {BOTH}"),
    ({"lr": None}, f"lr=None {ONE}"),
    ({"lr": "1e-3"}, f"lr='1e-3' {ONE}"),
    ({"lr": torch.ones(2)}, f"lr=.* {ONE}"),
    ({"lr": [1e-3]}, f"lr=.* {ONE}"),
    ({"eps": "x"}, f"eps='x' {ONE}"),
    ({"eps": torch.ones(3)}, f"eps=.* {ONE}"),
    ({"weight_decay": None}, f"weight_decay=None {ONE}"),
    ({"weight_decay": 1j}, f"weight_decay=1j {ONE}"),
]


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(("change", "said"), SET, ids=[str(index) for index in range(len(SET))])
def test_hyperparameters_of_another_kind_are_refused_by_group_and_key(change: dict[str, Any], said: str, differentiable: bool) -> None:
    if said != SET[4][1]:  # torch's words, which a test of its errors compares
        with pytest.raises(InputError, match="^(betas|lr|Tensor lr|eps|weight_decay) must be "):
            AdamW([Parameter(torch.ones(2))], **HYPER | change)
    with pytest.raises(InputError, match=f"^group 0: {said}; set it in optimizer.param_groups$"):
        AdamW([{"params": [Parameter(torch.ones(2))], **change}], **HYPER)
    optimizer, param = stepped()
    optimizer.defaults["differentiable"] = differentiable
    before, saved = tensors(optimizer), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[1].update(change)
    with pytest.raises(InputError, match=f"^group 1: {said}; set it in optimizer.param_groups$"):
        optimizer.step()
    saved["param_groups"][1].update(change)
    with pytest.raises(InputError, match=f"^group 1: {said}"):
        stepped()[0].load_state_dict(saved)
    assert all(map(torch.equal, tensors(optimizer), before))


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "maximize", "amsgrad", "params"])
def test_a_group_without_a_key_is_refused_by_its_name(key: str, differentiable: bool) -> None:
    optimizer, _ = stepped()
    optimizer.defaults["differentiable"] = differentiable
    optimizer.param_groups[1].pop(key)
    with pytest.raises(InputError, match=f"^group 1: has no {key}: give it the keys of AdamW's groups"):
        optimizer.step()


@pytest.mark.parametrize("given", [0.0, -1, NAN, "x", [1.0], 1j], ids=str)
def test_a_norm_that_is_none_is_refused_before_and_after_the_first_step(given: Any) -> None:
    with pytest.raises(InputError, match="^max_grad_norm: .* is no positive number"):
        AdamW([Parameter(torch.ones(2))], max_grad_norm=given)
    for options in ({}, {"max_grad_norm": 1.0}, {"differentiable": True}):
        optimizer, _ = stepped(max_grad_norm=options.get("max_grad_norm"))
        optimizer.defaults |= options
        before, optimizer.max_grad_norm = tensors(optimizer), given
        for _ in range(2):
            with pytest.raises(InputError, match="^max_grad_norm: .* is no positive number"):
                optimizer.step()
        assert all(map(torch.equal, tensors(optimizer), before))


NO_STATE = [None, [], {}, {"state": {}}, {"state": {}, "param_groups": None}, {"state": [], "param_groups": []}, 3]


@pytest.mark.parametrize("given", NO_STATE, ids=str)
def test_what_is_no_state_dict_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="^state_dict: must hold a dict `state` and a list `param_groups` "):
        stepped()[0].load_state_dict(given)


def test_groups_of_another_optimizer_are_refused_by_group_and_key() -> None:
    (optimizer, _), (source, _) = stepped(), stepped()
    before, groups = tensors(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    for momentum in (0.0, 0.9):
        sgd = torch.optim.SGD([{"params": group["params"]} for group in source.param_groups], lr=0.1, momentum=momentum)
        sgd.step()
        with pytest.raises(InputError, match="^group 0: has no betas, eps: give it the keys of AdamW's groups, as an AdamW saves them$"):
            optimizer.load_state_dict(sgd.state_dict())
    for group in (3, {}, {"params": 3}):
        with pytest.raises(InputError, match="^state_dict: group 1 has no list `params`"):
            optimizer.load_state_dict({"state": {}, "param_groups": [source.state_dict()["param_groups"][0], group]})
    assert all(map(torch.equal, tensors(optimizer), before)) and optimizer.state_dict()["param_groups"] == groups


def test_a_rate_that_a_schedule_rounds_below_zero_is_one_of_zero() -> None:
    optimizer, param = stepped()
    before, optimizer.param_groups[1]["lr"] = param.detach().clone(), -3e-20
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.bfloat16, torch.int32], ids=str)
def test_scaler_tensors_of_any_dtype_are_read_as_what_they_say(dtype: torch.dtype) -> None:
    for found in (0, 1):
        optimizer, param = stepped()
        expected, other = stepped()
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found).to(dtype), torch.tensor(4 if dtype != torch.bool else 1).to(dtype)
        before = param.detach().clone()
        other.grad = other.grad / (4 if dtype != torch.bool else 1)
        optimizer.step()
        expected.step()
        assert torch.equal(param, before if found else other)
    optimizer.found_inf = torch.zeros(2)
    with pytest.raises(InputError, match="found_inf"):
        optimizer.step()


def test_a_gradient_negated_lazily_is_read_with_its_sign() -> None:
    optimizer, param = stepped()
    expected, other = stepped()
    param.grad, other.grad = torch._neg_view(torch.full((8, 6), 2.0)), torch.full((8, 6), -2.0)
    optimizer.step()
    expected.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize("mode", ["remainder", "remainder8"])
@pytest.mark.parametrize("moments", [None, torch.float32, "int8"], ids=str)
def test_a_frozen_unit_keeps_its_remainder_under_nan_infinities_and_minus_zero(moments: torch.dtype | str | None, mode: str) -> None:
    special = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1.0], dtype=torch.bfloat16).repeat(16)
    for backend in ("cpu", "torch"):
        optimizer, param = stepped((6, 96), torch.bfloat16, master_weights=mode, state_dtype=moments, backend=backend)
        optimizer.set_unit_lr(param, torch.tensor([0.0, 1.0] * 48), dim=1)
        param.data.copy_(special)
        kept = optimizer.state[param][mode]
        optimizer._collector.written[id(param)] = param._version
        kept.copy_(torch.arange(576).mul(7919).remainder(65536).sub(32768).view(6, 96))
        before, bits = kept[:, ::2].clone(), param.detach().view(torch.int16)[:, ::2].clone()
        optimizer.step()
        assert torch.equal(kept[:, ::2], before) and torch.equal(param.detach().view(torch.int16)[:, ::2], bits), backend
