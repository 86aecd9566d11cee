"""AdamW whose parameter, gradient and state tensors become others between two steps."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from tests.crash.adamw_runs import Change, backend_for, changed_run, drawn, refused
from tests.crash.case import Case

OTHERS = {
    "longer": lambda x: torch.cat([x.flatten(), x.flatten(), x.new_ones(3)]),
    "shorter": lambda x: x.flatten()[: x.numel() // 2].clone(),
    "its first half in place": lambda x: x.flatten()[: x.numel() // 2],
    "flat": lambda x: x.flatten(),
    "of one more dimension": lambda x: x[None].clone(),
    "bf16": lambda x: x.to(torch.bfloat16),
    "fp16": lambda x: x.to(torch.float16),
    "fp64": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "int32": lambda x: x.int(),
    "complex": lambda x: x.float().to(torch.complex64),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape) if x.numel() else x,
    "in another order": lambda x: x.t().contiguous().t() if x.ndim == 2 else x.clone(),
    "of another place": lambda x: x.clone(),
    "every second of more": lambda x: torch.stack([x, x], -1)[..., 0],
    "negated lazily": lambda x: torch._neg_view(-x),
    "of 3 numbers": lambda x: x.new_ones(3),
}
VIEWS = ("its first half in place", "flat", "expanded")  # of the memory that was there, from the same address
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "remainder", "compensation", "step")


def replaced(key: str, name: str, how: str) -> Change:
    """`key`: a state's, "param" or "grad". how: as the state's entry, or under the tensor that is there (`data`)."""
    other = OTHERS[name]

    def change(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
        state = optimizer.state[param]
        if key == "param":
            param.data = other(param.data)
        elif key == "grad":
            param.grad.data = other(param.grad.data)
        elif key in state and how == "data":
            state[key].data = other(state[key])
        elif key in state:
            state[key] = other(state[key])

    return change


def replaced_tensors(draw: random.Random) -> Case:
    setting = drawn(draw)
    backend, name, how = backend_for(draw, setting), draw.choice(list(OTHERS)), draw.choice(("entry", "data"))
    key = draw.choice(("param", "grad", *STATES))
    change, right = replaced(key, name, how), None
    if key == "grad" and name in ("bf16", "fp16", "fp64") and setting.dtype != torch.bfloat16:  # taken here, where torch refuses

        def cast(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
            change(optimizer, param)
            param.grad = None if param.grad is None else param.grad.to(param.dtype)

        right = partial(setting.run, cast, False)
    elif key == "param" and name in ("bf16", "fp16"):  # which torch rounds more often
        right = partial(setting.run, change, True, "torch")
    elif key in STATES and name in VIEWS and how == "data":  # may be taken for what it was: the memory is still there
        right = partial(setting.right, change, after=4)
    return changed_run(setting, backend, f"{key} {name}, by {how}", change, right)


def shrunk_storages(draw: random.Random) -> Case:
    """Of every tensor that a step reads or writes; torch reads past the end."""
    setting = drawn(draw)
    setting = setting._replace(shape=draw.choice([(8, 64), (100, 64), (7,), (3, 2, 5)]))
    backend, key, left = backend_for(draw, setting), draw.choice(("param", "grad", *STATES[:2])), draw.choice((0, 1, 4))

    def change(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
        tensor: Tensor = {"param": param, "grad": param.grad}.get(key, optimizer.state[param].get(key))
        tensor.untyped_storage().resize_(left * tensor.element_size())

    return changed_run(setting, backend, f"storage of {key} cut to {left} elements", change, refused)


def absent_keys(draw: random.Random) -> Case:
    setting = drawn(draw, low=False)
    key = draw.choice(("step", "exp_avg", "exp_avg_sq"))
    values = {"missing": None, "None": None, "a number": 1.5, "a list": [1.0], "text": "exp_avg", "numpy": torch.ones(4).numpy()}
    name = draw.choice(list(values))

    def change(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
        optimizer.state[param][key] = values[name]
        if name == "missing":
            del optimizer.state[param][key]

    return changed_run(setting, backend_for(draw, setting), f"{key} {name}", change, refused)


def counts(draw: random.Random) -> Case:
    """`step` of other values: what torch makes of it, where that is a number."""
    setting = drawn(draw, low=False)
    backend, in_place = backend_for(draw, setting), draw.random() < 0.5
    value = draw.choice((-1.0, -5.0, 0.0, 1.0, 2.5, 1e6, 1e30, float("inf"), float("nan"), 2.0**24))

    def change(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
        if in_place and backend != "triton":  # which reads it on the device, where no host waits for it
            optimizer.state[param]["step"].fill_(value)
        else:
            optimizer.state[param]["step"] = torch.tensor(value)

    right = None if value in (0.0, 1.0, 1e6, 2.0**24) else refused
    return changed_run(setting, backend, f"step {value}, in place: {in_place}", change, right, rtol=1e-4)


FAMILIES = (replaced_tensors, shrunk_storages, absent_keys, counts)
