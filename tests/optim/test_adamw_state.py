"""AdamW's state: to and from torch's in mid-run, files, copies, dtypes and rates."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13, "amsgrad": True}
SHAPES = [(7, 5), (0, 3), (11,), (3, 2, 5)]
RATES = torch.tensor([0.1, 0.7, 1.3, 0.0, 1.9, 0.3333333, 1.0])


def build(
    cls: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32, like: torch.optim.Optimizer | None = None, **options: object
) -> torch.optim.Optimizer:
    """An optimizer over two groups, with the values of `like`'s parameters where given."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    if like is not None:
        params = [Parameter(p.detach().clone()) for p in every(like)]
    return cls([{"params": params[:3]}, {"params": params[3:], "lr": 1e-2}], **HYPER | options)


def every(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, first: int, last: int, skip: int | None = None) -> list[Tensor]:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(every(optimizer)):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if index == skip:
                p.grad = None
        optimizer.step()
    return [p.detach().clone() for p in every(optimizer)]


def through_a_file(state_dict: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("theirs", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("direction", ["ours_to_torch", "torch_to_ours"])
def test_interchange_with_torch_in_mid_run(theirs: dict, direction: str) -> None:
    pair = ((AdamW, {}), (torch.optim.AdamW, theirs))
    (first, first_options), (second, second_options) = pair if direction == "ours_to_torch" else reversed(pair)
    straight = build(torch.optim.AdamW, foreach=False)
    expected = train(straight, 1, 9)
    start = build(first, **first_options)
    train(start, 1, 5)
    other = build(second, like=start, **second_options)
    other.load_state_dict(through_a_file(start.state_dict()))
    for a, b in zip(train(other, 5, 9), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    steps = {state["step"].item() for state in other.state.values()}
    assert steps == {8.0}
    if "fused" not in theirs:
        assert other.state_dict()["state"][0].keys() == straight.state_dict()["state"][0].keys()
        assert other.param_groups[0].keys() == straight.param_groups[0].keys()


def test_a_loaded_state_is_a_copy() -> None:
    start = build(torch.optim.AdamW)
    train(start, 1, 3)
    ours = build(AdamW, like=start)
    ours.load_state_dict(start.state_dict())
    before = start.state[every(start)[0]]["exp_avg"].clone()
    train(ours, 3, 5)
    assert torch.equal(start.state[every(start)[0]]["exp_avg"], before)
    assert start.state[every(start)[0]]["step"].item() == 2


@pytest.mark.parametrize("mode", [None, "copy", "remainder", "remainder8", "kahan", "stochastic"])
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resumed_run_equals_uninterrupted_in_bf16(mode: str | None, how: str) -> None:
    options = {"master_weights": mode, "state_dtype": torch.float32, "max_grad_norm": 2.0}
    straight = build(AdamW, torch.bfloat16, **options)
    straight.set_unit_lr(every(straight)[0], RATES)
    halfway = build(AdamW, torch.bfloat16, **options)
    halfway.set_unit_lr(every(halfway)[0], RATES)
    expected = train(straight, 1, 9)
    train(halfway, 1, 5)
    if how == "file":
        resumed = build(AdamW, torch.bfloat16, like=halfway, **options)
        resumed.load_state_dict(through_a_file(halfway.state_dict()))
    else:
        resumed = copy.deepcopy(halfway) if how == "deepcopy" else pickle.loads(pickle.dumps(halfway))
    assert same(train(resumed, 5, 9), expected)
    dtypes = {key: value.dtype for key, value in resumed.state_dict()["state"][0].items() if isinstance(value, Tensor)}
    masters = {"copy": ("master", torch.float32), "remainder": ("remainder", torch.int16), "kahan": ("compensation", torch.bfloat16)}
    masters["remainder8"] = ("remainder8", torch.int8)
    own = dict([masters[mode]] if mode in masters else [])
    moments = dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.float32)
    assert dtypes == moments | {"unit_lr": torch.float32} | own
    assert torch.equal(resumed.unit_lr(every(resumed)[0])[0], RATES)
    assert "unit_lr" not in resumed.state_dict()["state"][2]


def test_fp32_rates_pass_through_a_state_dict_of_bf16_parameters() -> None:
    ours = build(AdamW, torch.bfloat16)
    ours.set_unit_lr(every(ours)[0], RATES)
    ours.set_unit_lr(every(ours)[3], RATES[:6].view(3, 2), 0)
    train(ours, 1, 2)
    saved = through_a_file(ours.state_dict())
    assert saved["state"][0]["unit_dim"] == 0 and torch.equal(saved["state"][0]["unit_lr"], RATES)
    assert "unit_lr" not in saved["param_groups"][0]
    other = build(AdamW, torch.bfloat16)
    other.load_state_dict(saved)
    assert torch.equal(other.unit_lr(every(other)[3])[0], RATES[:6].view(3, 2))
    assert other.unit_lr(every(other)[2]) is None


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle", "swap"])
def test_rates_before_the_first_step_survive(how: str) -> None:
    straight = build(AdamW)
    straight.set_unit_lr(every(straight)[3], torch.tensor([0.2, 1.7]), 1)
    fresh = build(AdamW)
    fresh.set_unit_lr(every(fresh)[3], torch.tensor([0.2, 1.7]), 1)
    if how == "file":
        other = build(AdamW)
        other.load_state_dict(through_a_file(fresh.state_dict()))
    elif how == "swap":
        other = fresh
        for group in other.param_groups:
            group["params"] = [Parameter(p.detach().clone()) for p in group["params"]]
    else:
        other = copy.deepcopy(fresh) if how == "deepcopy" else pickle.loads(pickle.dumps(fresh))
    multipliers, dim = other.unit_lr(every(other)[3])
    assert dim == 1 and torch.equal(multipliers, torch.tensor([0.2, 1.7]))
    assert same(train(other, 1, 4), train(straight, 1, 4))


def test_rates_of_parameters_without_gradients_wait_in_their_group() -> None:
    ours = build(AdamW)
    for p in every(ours):
        ours.set_unit_lr(p, 0.5)
    train(ours, 1, 3, skip=2)
    saved = through_a_file(ours.state_dict())
    assert list(saved["param_groups"][0]["unit_lr"]) == [2]
    assert saved["state"].keys() == {0, 1, 3}
    other = build(AdamW, like=ours)
    other.load_state_dict(saved)
    assert [other.unit_lr(p)[0].item() for p in every(other)] == [0.5] * 4
    theirs = build(torch.optim.AdamW, like=ours)
    theirs.load_state_dict(saved)
    train(theirs, 3, 4)


def test_loading_replaces_rates_unless_the_state_has_none() -> None:
    torch_run, rated, target = build(torch.optim.AdamW), build(AdamW), build(AdamW)
    train(torch_run, 1, 3)
    rated.set_unit_lr(every(rated)[0], RATES)
    train(rated, 1, 3)
    target.set_unit_lr(every(target)[2], 0.25)
    target.load_state_dict(torch_run.state_dict())
    assert target.unit_lr(every(target)[2])[0].item() == 0.25
    target.load_state_dict(rated.state_dict())
    assert target.unit_lr(every(target)[2]) is None and torch.equal(target.unit_lr(every(target)[0])[0], RATES)


@pytest.mark.parametrize("mode", ["copy", "remainder"])
def test_a_master_that_torch_trained_past_starts_again(mode: str) -> None:
    """torch's load_state_dict casts a master it does not know to bf16, and its steps move the parameter on."""
    ours = build(AdamW, torch.bfloat16, master_weights=mode)
    train(ours, 1, 4)
    theirs = build(torch.optim.AdamW, like=ours)
    theirs.load_state_dict(ours.state_dict())
    train(theirs, 4, 6)
    back = build(AdamW, like=theirs, master_weights=mode)
    back.load_state_dict(theirs.state_dict())
    clean_state = theirs.state_dict()
    clean_state["state"] = {k: {n: v for n, v in s.items() if n not in ("master", "remainder")} for k, s in clean_state["state"].items()}
    clean = build(AdamW, like=theirs, master_weights=mode)
    clean.load_state_dict(clean_state)
    assert same(train(back, 6, 8), train(clean, 6, 8))


def test_a_master_of_another_mode_is_dropped() -> None:
    keys = {None: None, "copy": "master", "remainder": "remainder", "kahan": "compensation", "stochastic": None, "remainder8": "remainder8"}
    for mode in keys:
        ours = build(AdamW, torch.bfloat16, master_weights=mode)
        train(ours, 1, 3)
        for other, key in keys.items():
            loaded = build(AdamW, like=ours, master_weights=other)
            loaded.load_state_dict(ours.state_dict())
            kept = loaded.state[every(loaded)[0]].keys() & set(keys.values())
            assert kept == ({key} if key and mode == other else set()), (mode, other)


def test_moments_take_the_dtype_asked_for_on_load() -> None:
    theirs = build(torch.optim.AdamW, torch.bfloat16)
    train(theirs, 1, 3)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        ours = build(AdamW, like=theirs, state_dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        assert {state["exp_avg"].dtype for state in ours.state.values()} == {expected}
        assert {state["step"].dtype for state in ours.state.values()} == {torch.float32}


def test_users_hooks_see_the_rates_and_may_replace_the_state() -> None:
    ours = build(AdamW)
    ours.set_unit_lr(every(ours)[0], RATES)
    train(ours, 1, 2)
    seen = []
    ours.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0]["unit_dim"]))
    saved = ours.state_dict()
    other = build(AdamW)

    def double(_: torch.optim.Optimizer, state: dict) -> dict:
        first = state["state"][0] | {"exp_avg": 2 * state["state"][0]["exp_avg"]}
        return state | {"state": state["state"] | {0: first}}

    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(saved)
    assert seen == [0]
    assert torch.equal(other.state[every(other)[0]]["exp_avg"], 2 * ours.state[every(ours)[0]]["exp_avg"])


def test_a_step_kept_as_a_number_is_read() -> None:
    old = build(torch.optim.AdamW)
    train(old, 1, 4)
    state = old.state_dict()
    for values in state["state"].values():
        values["step"] = 3
    ours = build(AdamW, like=old)
    ours.load_state_dict(state)
    train(ours, 4, 5)
    assert {s["step"].item() for s in ours.state.values()} == {4.0}


class Quantized(Tensor):
    """A state tensor of another optimizer, half of what it stands for."""

    def dequantize(self) -> Tensor:
        return 2 * self.as_subclass(Tensor)


def test_states_of_optimizers_that_quantise_are_dequantised() -> None:
    old = build(torch.optim.AdamW)
    train(old, 1, 4)
    saved = old.state_dict()
    halves = {n: {k: v if k == "step" else (v / 2).as_subclass(Quantized) for k, v in each.items()} for n, each in saved["state"].items()}
    ours, plain = build(AdamW, like=old), build(AdamW, like=old)
    ours.load_state_dict(saved | {"state": halves})
    plain.load_state_dict(saved)
    for param, like in zip(every(ours), every(plain), strict=True):
        assert type(ours.state[param]["exp_avg"]) is Tensor and torch.equal(ours.state[param]["exp_avg"], plain.state[like]["exp_avg"])
