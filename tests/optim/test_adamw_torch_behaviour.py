"""What torch's own tests (test/test_optim.py) ask of AdamW around its results: states, hooks, schedules, groups, closures, modes.

Its inputs, and parameters and gradients of unusual form: test_adamw_torch_inputs.py. Its cases that are not here:
    rosenbrock_sparse, second_order_optims            sparse gradients are refused, no line search
    defaults_changed_to_foreach, peak_memory_foreach  there is no foreach form to choose or to measure
    set_default_dtype_works_with_foreach              step is fp32 under every default dtype here; torch's is fp64 under fp64
    fused_error_on_params_on_meta                     fused chooses nothing, so nothing is refused for it
    large_tensor, multigpu, mixed_device, ..._cuda    64 GB; several GPUs; a GPU
    fused_does_not_step_if_foundinf, differentiable   test_adamw_scaling.py, test_adamw.py
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adept_fast.ops.dispatch import status
from adept_fast.optim import AdamW

HYPER = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-7, "weight_decay": 0.13}
on_cpu_backends = pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if status()[name].found])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train(optimizer: torch.optim.Optimizer, first: int = 0, last: int = 5) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for index, p in enumerate(params):
            p.grad = draw(*p.shape, seed=100 * step + index + 1, dtype=p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def model_and_loss(seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, lambda: (model(draw(7, 3, seed=9)) - draw(7, 2, seed=8)).square().mean()


def steps(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def equal(a: Any, b: Any) -> bool:
    """Of nested states, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_a_loaded_run_continues_as_the_original(named: tuple[bool, bool]) -> None:
    (first, first_loss), (second, second_loss) = model_and_loss(), model_and_loss(1)
    a, b = (AdamW(m.named_parameters() if n else m.parameters(), **HYPER) for m, n in zip((first, second), named, strict=True))
    steps(a, first_loss, 4)
    second.load_state_dict(first.state_dict())
    saved = copy.deepcopy(a.state_dict())
    untouched = copy.deepcopy(saved)
    b.load_state_dict(saved)
    assert equal(saved, untouched)
    assert steps(a, first_loss, 5) == steps(b, second_loss, 5)
    assert equal(a.state_dict()["state"], b.state_dict()["state"]) and equal(saved, untouched)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [o.param_groups[0].get("param_names") for o in (a, b)] == [names if named[0] else None, names if any(named) else None]


def test_state_dicts_of_earlier_torch_releases_load() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER, maximize=True)
    train(optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    for flag in ("foreach", "differentiable", "fused", "maximize", "capturable", "amsgrad", "decoupled_weight_decay"):
        del old["param_groups"][0][flag]
    optimizer.load_state_dict(old)
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == optimizer.defaults
    train(optimizer, 5, 6)


def test_groups_take_the_loaded_options_and_keep_foreign_keys() -> None:
    saved = AdamW([{"params": [Parameter(draw(3))], "note": "a"}, {"params": [Parameter(draw(2))], "lr": 0.5}], **HYPER)
    train(saved)
    loaded = AdamW([{"params": [Parameter(draw(3))], "lr": 7.0}, {"params": [Parameter(draw(2))]}], lr=9.0)
    loaded.load_state_dict(saved.state_dict())
    for a, b in zip(saved.param_groups, loaded.param_groups, strict=True):
        assert a | {"params": 0} == b | {"params": 0}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", ["exponential", "one_cycle"])
def test_schedules_resume_from_state_dicts(kind: str, tensor_lr: bool) -> None:
    def build(start: Tensor) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = AdamW([Parameter(start.clone())], **HYPER | {"lr": torch.tensor(0.03) if tensor_lr else 0.03})
        return optimizer, ExponentialLR(optimizer, 0.8) if kind == "exponential" else OneCycleLR(optimizer, 0.05, total_steps=12)

    def go(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, first: int, last: int) -> list[tuple[float, list[float]]]:
        seen = []
        for step in range(first, last):
            (p,) = train(optimizer, step, step + 1)
            scheduler.step()
            seen.append((float(optimizer.param_groups[0]["lr"]), p.tolist()))
        return seen

    straight = build(draw(5))
    rate = straight[0].param_groups[0]["lr"]
    expected = go(*straight, 0, 9)
    assert len({rate for rate, _ in expected}) == 9
    assert not tensor_lr or straight[0].param_groups[0]["lr"] is rate  # schedulers write into it
    halfway = build(draw(5))
    go(*halfway, 0, 4)
    resumed = build(halfway[0].param_groups[0]["params"][0].detach())
    for new, old in zip(resumed, halfway, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert go(*resumed, 4, 9) == expected[4:]


@pytest.mark.parametrize("groups", [[[2, 3, 4]], [[2], [3, 4, 5]]], ids=str)
def test_state_dicts_that_do_not_fit_are_refused_in_torchs_words(groups: list[list[int]]) -> None:
    saved = AdamW([{"params": [Parameter(draw(2))]}, {"params": [Parameter(draw(3)), Parameter(draw(4))]}], **HYPER).state_dict()
    messages = []
    for cls in (torch.optim.AdamW, AdamW):
        optimizer = cls([{"params": [Parameter(draw(n)) for n in group]} for group in groups], **HYPER)
        with pytest.raises(ValueError) as raised:
            optimizer.load_state_dict(saved)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_moments_take_the_dtype_of_the_parameters_they_are_loaded_for(dtype: torch.dtype) -> None:
    saved = AdamW([Parameter(draw(5, 3))], **HYPER, amsgrad=True)
    train(saved)
    other = AdamW([Parameter(draw(5, 3, dtype=dtype))], **HYPER, amsgrad=True)
    other.load_state_dict(saved.state_dict())
    kept, original = other.state_dict()["state"][0], saved.state_dict()["state"][0]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert kept[key].dtype == dtype and torch.equal(kept[key], original[key].to(dtype))
    assert kept["step"].dtype == torch.float32 and kept["step"].item() == 5
    train(other, 5, 6)


def test_copies_have_every_public_attribute_and_take_hooks() -> None:
    optimizer = AdamW([Parameter(draw(5, 3))], **HYPER, state_dtype=torch.float32, max_grad_norm=2.0)
    train(optimizer)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {key for key in vars(other) if not key.startswith("_")} == public
        seen = []
        other.register_step_post_hook(lambda *_, seen=seen: seen.append("step"))
        train(other, 5, 6)
        assert seen == ["step"]


def test_step_hooks_run_in_torchs_order_and_may_replace_the_arguments() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER)
    calls: list[Any] = []

    def record(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(record("global before")),
        register_optimizer_step_post_hook(record("global after")),
        optimizer.register_step_pre_hook(record("before")),
        optimizer.register_step_post_hook(record("after")),
    ]
    try:
        optimizer.step(lambda: calls.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global before", "before", "closure", "after", "global after"]
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"closure": lambda: "replaced"}))
    assert optimizer.step(closure=lambda: "given") == "replaced" and len(calls) == 5


def test_state_dict_hooks() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER)
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update({"note": 1}))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"order": [*state.get("order", []), "registered"]})
    optimizer.register_state_dict_post_hook(lambda _, state: state.update(order=["prepended"]), prepend=True)
    saved = optimizer.state_dict()
    assert saved["state"]["note"] == 1 and saved["order"] == ["prepended", "registered"]
    optimizer.load_state_dict(saved)
    assert optimizer.state["note"] == 1


def test_load_hooks_may_edit_replace_and_prepend() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER)
    train(optimizer)
    saved, after = optimizer.state_dict(), []

    def replace(_: torch.optim.Optimizer, state: dict) -> dict:
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.003
        state["state"][0]["exp_avg"].fill_(7.0)
        return state

    def edit(_: torch.optim.Optimizer, state: dict) -> None:
        state["param_groups"] = [state["param_groups"][0] | {"lr": 0.002}]

    optimizer.register_load_state_dict_pre_hook(edit)
    optimizer.register_load_state_dict_post_hook(lambda o: after.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.load_state_dict(saved)
    assert after == [0.002, 0.002, 0.003]
    assert optimizer.state_dict()["state"][0]["exp_avg"].tolist() == [7.0] * 3
    assert saved["param_groups"][0]["lr"] == HYPER["lr"] and saved["state"][0]["exp_avg"].tolist() != [7.0] * 3


BAD_PARAMS = {
    "tensor": lambda: draw(3),
    "nothing": lambda: [],
    "set": lambda: [{"params": {Parameter(draw(3))}}],
    "number": lambda: [Parameter(draw(3)), 1.5],
    "not_leaf": lambda: [draw(3).requires_grad_() * 2],
    "no_params": lambda: [{"lr": 0.1}],
    "half_named": lambda: [("a", Parameter(draw(3))), Parameter(draw(2))],
    "twice": lambda: [{"params": list(shared)} for shared in [[Parameter(draw(3))]] * 2],
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_parameters_raise_as_in_torch(case: str) -> None:
    caught = []
    for cls in (torch.optim.AdamW, AdamW):
        with pytest.raises((TypeError, ValueError, KeyError)) as raised:
            cls(BAD_PARAMS[case](), **HYPER)
        caught.append((type(raised.value), str(raised.value)))
    assert caught[0] == caught[1]


def test_added_groups_are_as_optimizers_of_their_own() -> None:
    """Given as a tensor, a generator or names; what they leave out comes from the defaults, and a bad one leaves nothing behind."""
    options = [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.75)}]
    first, second, third = (Parameter(draw(n)) for n in (3, 2, 4))
    optimizer = AdamW((p for p in [first]), **HYPER)
    optimizer.add_param_group({"params": second} | options[1])
    optimizer.add_param_group({"params": (p for p in [third])} | options[2])
    for bad in ({"params": [third]}, {"params": [("name", Parameter(draw(2)))]}, {"params": [1.0]}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(bad)
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second], [third]]
    own = [AdamW([Parameter(p.detach().clone())], **HYPER | extra) for p, extra in zip((first, second, third), options, strict=True)]
    for step in range(5):
        train(optimizer, step, step + 1)
        for other, p in zip(own, (first, second, third), strict=True):
            other.param_groups[0]["params"][0].grad = p.grad.clone()
            other.step()
            assert torch.equal(other.param_groups[0]["params"][0], p)
    named = AdamW([("a", Parameter(draw(3)))], **HYPER)
    named.add_param_group({"params": [("b", Parameter(draw(2)))]})
    assert [group["param_names"] for group in named.param_groups] == [["a"], ["b"]]


@on_cpu_backends
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", [{}, {"capturable": True}], ids=str)
def test_step_is_fp32_and_counts_beyond_what_bf16_holds(flags: dict[str, bool], default: torch.dtype, backend: str) -> None:
    p = Parameter(draw(3, dtype=torch.bfloat16))
    optimizer = AdamW([p], **HYPER, **flags, backend=backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    step = optimizer.state[p]["step"]
    assert step.dtype == torch.float32 and step.shape == () and step.device.type == "cpu" and step.item() == 300


def test_profilers_and_readers_see_torchs_names() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER)
    assert repr(optimizer).startswith("AdamW (\nParameter Group 0") and "\n    lr: 0.003\n" in repr(optimizer)
    with torch.profiler.profile() as profile:
        train(optimizer, 0, 1)
        optimizer.zero_grad()
    assert {event.key for event in profile.key_averages()} >= {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"}


def test_tied_weights_move_once() -> None:
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        embedding, head = model = nn.ModuleList([nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)])
        head.weight = embedding.weight = Parameter(draw(6, 4))
        optimizer = cls(model.parameters(), **HYPER)
        steps(optimizer, lambda e=embedding, h=head: h(e(torch.tensor([0, 2, 5]))).logsumexp(-1).sum(), 5)
        assert head.weight is embedding.weight and [state["step"].item() for state in optimizer.state.values()] == [5.0]
        results.append(head.weight.detach())
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-7)


def test_a_closure_that_raises_leaves_everything() -> None:
    optimizer = AdamW([Parameter(draw(3))], **HYPER)
    trained, state = train(optimizer), copy.deepcopy(optimizer.state_dict())

    def closure() -> None:
        raise LookupError(torch.is_grad_enabled())

    with torch.no_grad():
        with pytest.raises(LookupError, match="True"):
            optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert equal([optimizer.param_groups[0]["params"][0].detach()], trained) and equal(optimizer.state_dict(), state)


@on_cpu_backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_change_no_bit(mode: Callable[[], Any], backend: str) -> None:
    plain, within = (AdamW([Parameter(draw(5, 3))], **HYPER, backend=backend) for _ in range(2))
    expected = train(plain)
    with mode():
        assert equal(train(within), expected)
    assert all(p.requires_grad and p.grad_fn is None for p in within.param_groups[0]["params"])
