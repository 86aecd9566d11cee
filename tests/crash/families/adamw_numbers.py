"""AdamW with hyperparameters, scales, multipliers and values at and beyond their ends."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.optim import AdamW
from tests.crash.adamw_runs import HYPER, backend_for, changed_run, drawn, refused
from tests.crash.case import Case

NAN, INF = float("nan"), float("inf")
VALUES = {
    "lr": (0.0, 1e-30, 0.5, -1e-20, NAN, INF, -INF, "fast", None, torch.tensor(0.1), torch.tensor([0.1]), torch.ones(2), torch.tensor(NAN)),
    "betas": ((0.0, 0.0), (0.3, 0.4), (0.9, 0.0), (1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, INF), (0.9, "x")),
    "eps": (1e-3, 1.0, -1e-8, NAN, INF, None),
    "weight_decay": (0.0, 2.0, -0.1, NAN, INF, "much"),
}


def _fits(name: str, value: object) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(x, str) or x is None or (isinstance(x, Tensor) and x.numel() > 1) or not abs(float(x)) < INF for x in numbers):
        return False
    return all(0 <= x < 1 for x in numbers) if name == "betas" else float(value) > -1e-12


def later_hyperparameters(draw: random.Random) -> Case:
    setting = drawn(draw)
    name = draw.choice(list(VALUES))
    value, backend = draw.choice(VALUES[name]), backend_for(draw, setting)

    def change(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
        optimizer.param_groups[0][name] = value

    tensor = isinstance(value, Tensor) and setting.dtype == torch.bfloat16 or isinstance(value, Tensor) and value.ndim > 0
    right = None if _fits(name, value) else refused
    if tensor and right is None:  # torch reads no lr of one dimension without foreach

        def number(optimizer: torch.optim.Optimizer, param: Parameter) -> None:
            optimizer.param_groups[0][name] = value.item()

        return Case(
            f"{name}={value!r} later; {setting}, backend {backend}",
            lambda: setting.run(change, True, backend),
            lambda: setting.run(number, True, "torch"),
            valid=True,
        )
    return changed_run(setting, backend, f"{name}={value!r} later", change, right, valid=right is None, rtol=2e-5, atol=1e-5)


def first_hyperparameters(draw: random.Random) -> Case:
    name = draw.choice(list(VALUES))
    value, of_group = draw.choice(VALUES[name]), draw.random() < 0.5

    def steps(cls: type[torch.optim.Optimizer]) -> list[Tensor]:
        param = Parameter(torch.linspace(-1, 1, 35).view(5, 7))
        param.grad = torch.linspace(2, -1, 35).view(5, 7)
        groups = [{"params": [param], name: value}] if of_group else [param]
        optimizer = cls(groups, **HYPER | ({} if of_group else {name: value}))
        optimizer.step()
        return [param.detach()]

    right = (lambda: steps(torch.optim.AdamW)) if _fits(name, value) else refused
    return Case(f"{name}={value!r}, of a group: {of_group}", lambda: steps(AdamW), right)


SCALES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.complex64)


def scales(draw: random.Random) -> Case:
    """found_inf and grad_scale in any dtype and shape, as GradScaler's kin set them."""
    setting = drawn(draw)
    backend, dtype = backend_for(draw, setting), draw.choice(SCALES)
    shape, found, scale = draw.choice(((), (1,), (2,))), draw.random() < 0.5, draw.choice((1.0, 4.0))
    maximum = draw.choice((None, 0.5))

    def run(optimizer: AdamW, params: list[Parameter]) -> list[Tensor]:
        optimizer.max_grad_norm = maximum
        optimizer.step()
        return [tensor.detach() for param in params for tensor in (param, *optimizer.state[param].values())]

    def ours() -> list[Tensor]:
        optimizer, params = setting.optimizer(True, backend)
        optimizer.found_inf = torch.full(shape, float(found)).to(dtype)
        optimizer.grad_scale = torch.full(shape, 1.0 if dtype == torch.bool else scale).to(dtype)
        return run(optimizer, params)

    def theirs() -> list[Tensor]:
        if shape == (2,) or dtype.is_complex:
            return refused()
        optimizer, params = setting.optimizer(True, "torch")
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(found)), torch.tensor(1.0 if dtype == torch.bool else scale)
        return run(optimizer, params)

    described = f"found_inf {found}, grad_scale {scale} of {dtype} and shape {shape}, max_grad_norm {maximum}; {setting}, backend {backend}"
    return Case(described, ours, theirs, rtol=1e-6, atol=0)


def frozen_units(draw: random.Random) -> Case:
    """A multiplier of 0 leaves parameter and master bit for bit as they were, whatever stands in them and in the gradient."""
    setting = drawn(draw)._replace(dtype=torch.bfloat16)
    mode, moments = draw.choice(("copy", "remainder", "kahan", "stochastic", None)), draw.choice((None, torch.float32))
    setting = setting._replace(own={"master_weights": mode, "state_dtype": moments}, shape=draw.choice(((16, 32), (6, 70), (33, 5))))
    backend, dim, kept = backend_for(draw, setting), draw.randrange(2), draw.random() < 0.3
    length = setting.shape[dim]
    frozen = torch.tensor([draw.random() < 0.5 for _ in range(length)])

    def steps(stepping: bool) -> list[Tensor]:
        optimizer, params = setting.optimizer(True, backend)
        param = params[0]
        if not kept:
            optimizer.set_unit_lr(param, torch.where(frozen, 0.0, torch.linspace(0.1, 2.0, length)), dim)
        optimizer.step()
        if kept:
            optimizer.set_unit_lr(param, torch.where(frozen, 0.0, torch.linspace(0.1, 2.0, length)), dim)
        special = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1e-40, 3e38, 1.0], dtype=torch.bfloat16)
        param.data.view(-1)[:] = special.repeat(param.numel() // 8 + 1)[: param.numel()]
        master = [value for key, value in optimizer.state[param].items() if key in ("master", "remainder", "compensation")]
        for tensor in master:
            if tensor.dtype == torch.int16:
                tensor.view(-1)[:] = torch.arange(tensor.numel()).mul(7919).sub(20000).to(torch.int16)
        if stepping:
            param.grad.view(-1)[::3] = NAN
            optimizer.step()
        return [_bits(tensor.detach().index_select(dim, frozen.nonzero().flatten())) for tensor in (param, *master)]

    described = f"frozen {frozen.int().tolist()} of dim {dim}, set late: {kept}; {setting}, backend {backend}"
    return Case(described, lambda: steps(True), lambda: steps(False), valid=True, finite=False, rtol=0, atol=0)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


MULTIPLIERS = {
    "of rows": lambda shape: torch.linspace(0.0, 1.7, shape[0]),
    "one": lambda shape: 0.25,
    "of elements": lambda shape: torch.linspace(0.1, 1.3, shape[0] * shape[1]).view(shape),
    "of elements in another order": lambda shape: torch.linspace(0.1, 1.3, shape[0] * shape[1]).view(shape[::-1]).t(),
    "expanded": lambda shape: torch.tensor([0.7]).expand(shape[0]),
    "every second": lambda shape: torch.linspace(0.0, 1.7, 2 * shape[0])[::2],
    "int64": lambda shape: torch.arange(shape[0]),
    "bool": lambda shape: torch.arange(shape[0]) % 2 == 0,
    "that require a gradient": lambda shape: torch.ones(shape[0], requires_grad=True),
    "a list": lambda shape: [1.0] * shape[0],
    "one too many": lambda shape: torch.ones(shape[0] + 1),
    "NaN": lambda shape: torch.full((shape[0],), NAN),
    "infinite": lambda shape: torch.full((shape[0],), INF),
    "beyond fp32": lambda shape: torch.full((shape[0],), 1e300, dtype=torch.float64),
    "negative": lambda shape: torch.full((shape[0],), -1.0),
    "complex": lambda shape: torch.ones(shape[0], dtype=torch.complex64),
    "on meta": lambda shape: torch.ones(shape[0], device="meta"),
    "sparse": lambda shape: torch.ones(shape[0]).to_sparse(),
    "text": lambda shape: "rows",
    "of three dimensions": lambda shape: torch.ones(*shape, 1),
}
GOOD = list(MULTIPLIERS)[:10]


def multipliers(draw: random.Random) -> Case:
    setting = drawn(draw, low=False)._replace(shape=draw.choice(((8, 64), (100, 3), (1, 5), (5, 1))))
    name, backend = draw.choice(list(MULTIPLIERS)), backend_for(draw, setting)
    twice = draw.random() < 0.5

    def ours() -> list[Tensor]:
        optimizer, params = setting.optimizer(True, backend)
        if twice:
            optimizer.step()
        optimizer.set_unit_lr(params[0], MULTIPLIERS[name](setting.shape))
        optimizer.step()
        return [params[0].detach()]

    def theirs() -> list[Tensor]:
        if name not in GOOD:
            return refused()
        rates = torch.as_tensor(MULTIPLIERS[name](setting.shape)).detach().float()
        rates = rates.view(*rates.shape, *[1] * (2 - rates.ndim)).expand(setting.shape)
        param = setting.parameters()[0]
        units = [Parameter(x.detach().clone()) for x in param.flatten()]
        for unit, grad in zip(units, param.grad.flatten(), strict=True):
            unit.grad = grad
        hyper = HYPER | {"lr": 0.0}
        optimizer = torch.optim.AdamW([{"params": [unit]} for unit in units], **hyper, **setting.options, foreach=False)
        for step in range(1 + twice):
            for group, rate in zip(optimizer.param_groups, rates.flatten().tolist(), strict=True):
                group["lr"] = HYPER["lr"] * (rate if step == twice else 1.0)
            optimizer.step()
        return [torch.stack([unit.detach() for unit in units]).view(setting.shape)]

    return Case(f"multipliers {name}, after a step: {twice}; {setting}, backend {backend}", ours, theirs, valid=name in GOOD)


FAMILIES = (later_hyperparameters, first_hyperparameters, scales, frozen_units, multipliers)
