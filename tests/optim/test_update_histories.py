"""Steps with random changes between them, against an optimizer that knows nothing of its last step; and the calls that a step makes."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.optim import AdamW
from adept_fast.optim.update_collection import UpdateCollector


class Subclass(Tensor):
    pass


def of(opt: AdamW, draw: random.Random) -> tuple[Tensor, dict[str, Any]]:
    """A parameter with a state, and that."""
    param = draw.choice([param for group in opt.param_groups for param in group["params"] if param in opt.state])
    return param, opt.state[param]


def anew(opt: AdamW, draw: random.Random, make: Callable[[Tensor], Tensor]) -> None:
    """Another tensor in a state, at times beside the earlier one and at times where that was."""
    _, state = of(opt, draw)
    key = draw.choice([key for key, value in state.items() if value.ndim] or ["step"])
    if key not in state:
        return
    made = make(state[key])
    if draw.random() < 0.5:
        del state[key]
    state[key] = made


def cloned(opt: AdamW, draw: random.Random) -> None:
    anew(opt, draw, lambda x: draw.choice([x.clone(), x.transpose(0, -1).contiguous().transpose(0, -1)]))


def another_dtype(opt: AdamW, draw: random.Random) -> None:
    anew(opt, draw, draw.choice([Tensor.clone, Tensor.clone, Tensor.double]))


def options_changed(opt: AdamW, draw: random.Random) -> None:
    new = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.3, "maximize": True, "fused": True, "capturable": True}
    key = draw.choice([*new])
    draw.choice(opt.param_groups)[key] = new[key]


def rates_changed(opt: AdamW, draw: random.Random) -> None:
    param = draw.choice([param for group in opt.param_groups for param in group["params"]])
    dim = draw.randrange(param.ndim)
    opt.set_unit_lr(param, draw.choice([None, 0.5, torch.linspace(0, 2, param.shape[dim])]), dim)


def without_gradients(opt: AdamW, draw: random.Random) -> None:
    for group in opt.param_groups:
        for param in group["params"]:
            if draw.random() < 0.5:
                param.grad = None


def gradient_elsewhere(opt: AdamW, draw: random.Random) -> None:
    param, _ = of(opt, draw)
    if param.grad is not None:
        buffer = torch.cat([torch.ones(3, dtype=param.dtype), param.grad.flatten()])
        param.grad = draw.choice([buffer[3:].view(param.shape), buffer[:1].expand(param.shape), param.grad.as_subclass(Subclass)])


def data_elsewhere(opt: AdamW, draw: random.Random) -> None:
    param, _ = of(opt, draw)
    param.data = draw.choice([param.data.clone(), param.data.transpose(0, -1).contiguous().transpose(0, -1)])


def data_of_another_dtype(opt: AdamW, draw: random.Random) -> None:
    param, _ = of(opt, draw)
    grad, param.grad = param.grad, None
    param.data = param.data.to(torch.bfloat16)
    param.grad = None if grad is None else grad.to(torch.bfloat16)


def edited(opt: AdamW, draw: random.Random) -> None:
    with torch.no_grad():
        of(opt, draw)[0].mul_(0.5)


def groups_reordered(opt: AdamW, draw: random.Random) -> None:
    draw.shuffle(opt.param_groups)


def params_reordered(opt: AdamW, draw: random.Random) -> None:
    group = draw.choice(opt.param_groups)
    group.pop("unit_lr", None)
    draw.shuffle(group["params"])


def moved_to_another_group(opt: AdamW, draw: random.Random) -> None:
    for group in opt.param_groups:
        group.pop("unit_lr", None)
    if opt.param_groups[0]["params"]:
        opt.param_groups[-1]["params"].insert(0, opt.param_groups[0]["params"].pop())


def in_two_groups(opt: AdamW, draw: random.Random) -> None:
    opt.param_groups[-1]["params"].append(of(opt, draw)[0])


def replaced_by_a_new_parameter(opt: AdamW, draw: random.Random) -> None:
    """The id and the memory of the one that goes may be used again."""
    group = draw.choice([group for group in opt.param_groups if group["params"]])
    param = group["params"].pop()
    shape, dtype = param.shape, param.dtype
    for other in opt.param_groups:
        other["params"] = [each for each in other["params"] if each is not param]
        other.pop("unit_lr", None)
    opt.state.pop(param, None)
    param = Parameter(torch.linspace(-1, 1, shape.numel()).view(shape).to(dtype))
    param.grad = torch.ones_like(param)
    group["params"].append(param)


def state_in_another_dict(opt: AdamW, draw: random.Random) -> None:
    param, state = of(opt, draw)
    opt.state[param] = draw.choice([dict, OrderedDict, UserDict])(state)


def state_gone(opt: AdamW, draw: random.Random) -> None:
    param, state = of(opt, draw)
    draw.choice([state.clear, lambda: opt.state.pop(param), lambda: state.pop(draw.choice([*state]))])()


def states_in_another_order(opt: AdamW, draw: random.Random) -> None:
    pairs = [*opt.state.items()]
    draw.shuffle(pairs)
    if draw.random() < 0.5:
        opt.state = defaultdict(dict, pairs)
    else:
        opt.state.clear()
        opt.state.update(pairs)


def states_exchanged(opt: AdamW, draw: random.Random) -> None:
    params = [param for param in opt.state if param.shape == (5, 70)]
    if len(params) == 2:
        opt.state[params[0]], opt.state[params[1]] = opt.state[params[1]], opt.state[params[0]]


def another_step(opt: AdamW, draw: random.Random) -> None:
    _, state = of(opt, draw)
    state.pop("step", None)
    state["step"] = torch.tensor(5.0, dtype=draw.choice([*[torch.float32] * 6, torch.float64]))


def settings_changed(opt: AdamW, draw: random.Random) -> None:
    name, values = draw.choice([
        ("max_grad_norm", (None, 0.1)), ("backend", (None, "torch")), ("state_dtype", (None, "int8")), ("master_weights", (None, "kahan")),
    ])  # fmt: skip
    setattr(opt, name, draw.choice(values))


def loaded(opt: AdamW, draw: random.Random) -> None:
    opt.load_state_dict(opt.state_dict())


RANDOM: list[Callable[[AdamW, random.Random], None]] = [
    cloned, cloned, another_dtype, options_changed, rates_changed,
    without_gradients, gradient_elsewhere, data_elsewhere, data_of_another_dtype, edited, groups_reordered, params_reordered,
    moved_to_another_group, in_two_groups, replaced_by_a_new_parameter, state_in_another_dict, state_gone, states_in_another_order,
    states_exchanged, another_step, settings_changed, loaded,
]  # fmt: skip
SETUPS = [
    (torch.float32, {}), (torch.float32, {"state_dtype": "int8"}), (torch.bfloat16, {"master_weights": "copy"}),
    (torch.bfloat16, {"state_dtype": "int8", "master_weights": "remainder8"}),
    (torch.bfloat16, {"master_weights": "kahan", "max_grad_norm": 1.0}),
]  # fmt: skip


def forget(opt: AdamW) -> None:
    """All but the version counters, which a lookup needs too."""
    opt._collector, before = UpdateCollector(), opt._collector
    opt._collector.written, opt._collector.edited = before.written, before.edited


def history(seed: int, forgets: bool) -> tuple[list[Tensor], str]:
    """All tensors after some steps with random changes between them, and the error that ended them."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, options = SETUPS[seed % len(SETUPS)]
    shapes = [(5, 70), (0, 64), (3, 4, 20), (11,), (5, 70), (4, 1)]
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in draw.sample(shapes, 5)]
    if draw.random() < 0.3:
        params[2] = Parameter(params[2].detach().as_subclass(Subclass))
    opt, error = AdamW([{"params": params[:3]}, {"params": params[3:], "lr": 0.05}], lr=0.02, weight_decay=0.1, **options), ""
    del params
    for step in range(12):
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        try:
            for change in draw.sample(RANDOM, draw.choice([0, 1, 1, 2])) if step else ():
                change(opt, draw)
            if forgets:
                forget(opt)
            opt.step()
        except (ValueError, RuntimeError) as raised:  # torch loads no UserDict, either
            error = f"{type(raised).__name__} in step {step}: {raised}"
            break
    params = [param for group in opt.param_groups for param in group["params"]]
    # A step that was refused may have zeroed the remainders of edited parameters.
    return [x.detach() for param in params for x in (param, *(() if error else opt.state.get(param, {}).values()))], error


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_histories_of_random_changes_are_those_without_plans(first: int) -> None:
    errors = 0
    for seed in range(first, first + 40):
        (ours, error), (plain, expected) = history(seed, False), history(seed, True)
        assert error == expected, seed
        assert [x.dtype for x in ours] == [x.dtype for x in plain] and all(map(torch.equal, ours, plain)), (seed, error)
        errors += bool(error)
    assert errors < 30, "histories end too soon to tell"


def test_hundreds_of_groups_and_gradients_that_come_and_go() -> None:
    ends = []
    for forgets in (False, True):
        draw = random.Random(0)
        params = [Parameter(torch.full((3,), float(i))) for i in range(465)]
        opt = AdamW([{"params": [p], "lr": 1e-2 * (1 + i % 3)} for i, p in enumerate(params)])
        for step in range(4):
            for p in params:
                p.grad = None if draw.random() < 0.2 else torch.full_like(p, float(step) - 1.5)
            opt.param_groups[300]["lr"] *= 2
            if forgets:
                forget(opt)
            opt.step()
        ends.append([x.detach() for p in params for x in (p, *opt.state[p].values())])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        (torch.float32, {}, 900),
        (torch.float32, {"state_dtype": "int8"}, 900),
        (torch.bfloat16, {"state_dtype": "int8", "master_weights": "remainder8"}, 900),
        (torch.bfloat16, {"master_weights": "copy", "max_grad_norm": 1.0}, 1300),
    ],
    ids=str,
)
def test_a_step_makes_few_calls(dtype: torch.dtype, options: dict[str, Any], most: int) -> None:
    """Of Python's functions and of C's, where a lookup of each of the 146 parameters makes 40. Time would depend on the machine."""
    pytest.importorskip("adept_fast._C", reason="the C++ extension was not built")
    params = [Parameter(torch.randn(4, 64).to(dtype)) for _ in range(146)]
    opt = AdamW(params, backend="cpu", **options)
    opt.set_unit_lr(params[3], torch.linspace(0, 1, 4))
    calls: Counter[str] = Counter()
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()

    def note(frame: Any, event: str, called: Any) -> None:
        if event in ("call", "c_call"):
            calls[frame.f_code.co_qualname if event == "call" else called.__qualname__] += 1

    sys.setprofile(note)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    assert sum(calls.values()) < most, calls.most_common(12)
