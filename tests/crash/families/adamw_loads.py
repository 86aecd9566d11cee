"""AdamW that loads state dicts of other optimizers, parameters and times, whole or damaged."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adept_fast.optim import AdamW
from tests.crash.adamw_runs import HYPER, SHAPES, Setting, backend_for, drawn, refused, results
from tests.crash.case import Case

NAN, INF = float("nan"), float("inf")


def loaded_shapes(draw: random.Random) -> Case:
    setting = drawn(draw, low=False)
    saved, backend = draw.choice(SHAPES), backend_for(draw, setting)

    def steps(ours: bool) -> list[Tensor]:
        first, _ = setting._replace(shape=saved, seed=setting.seed + 1).optimizer(ours, backend)
        first.step()
        second, params = setting.optimizer(ours, backend)
        if draw_steps:
            second.step()
        second.load_state_dict(first.state_dict())
        second.step()
        second.step()
        return results(second, params)

    draw_steps = draw.random() < 0.5
    described = f"a state of {saved} loaded into {setting}, backend {backend}, after a step: {draw_steps}"
    return Case(described, lambda: steps(True), lambda: steps(False), valid=saved == setting.shape)


def _first(state: dict[str, Any], **values: Any) -> None:
    state["state"][0].update(values)


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "rates that are NaN": lambda s: _first(s, unit_lr=torch.full((8,), NAN), unit_dim=0),
    "rates that are infinite": lambda s: _first(s, unit_lr=torch.full((8,), INF), unit_dim=0),
    "negative rates": lambda s: _first(s, unit_lr=torch.full((8,), -0.5), unit_dim=0),
    "too few rates": lambda s: _first(s, unit_lr=torch.ones(3), unit_dim=0),
    "too many rates": lambda s: _first(s, unit_lr=torch.ones(900), unit_dim=0),
    "complex rates": lambda s: _first(s, unit_lr=torch.ones(8, dtype=torch.complex64), unit_dim=0),
    "rates on meta": lambda s: _first(s, unit_lr=torch.ones(8, device="meta"), unit_dim=0),
    "rates of no dimension": lambda s: _first(s, unit_lr=torch.ones(8), unit_dim=7),
    "rates of a worded dimension": lambda s: _first(s, unit_lr=torch.ones(8), unit_dim="rows"),
    "rates that are text": lambda s: _first(s, unit_lr="all", unit_dim=0),
    "NaN rates that wait": lambda s: s["param_groups"][0].update(unit_lr={0: (torch.full((8,), NAN), 0)}),
    "rates that wait for a parameter that is not": lambda s: s["param_groups"][0].update(unit_lr={5: (torch.ones(8), 0)}),
    "rates that wait in a list": lambda s: s["param_groups"][0].update(unit_lr=[torch.ones(8)]),
    "no exp_avg_sq": lambda s: s["state"][0].pop("exp_avg_sq"),
    "no step": lambda s: s["state"][0].pop("step"),
    "another optimizer's": lambda s: s["state"].update({0: {"momentum_buffer": torch.ones(8, 64)}}),
    "no state but a tensor": lambda s: s["state"].update({0: torch.ones(8, 64)}),
    "None as state": lambda s: s["state"].update({0: None}),
    "exp_avg on meta": lambda s: _first(s, exp_avg=torch.ones(8, 64, device="meta")),
    "exp_avg None": lambda s: _first(s, exp_avg=None),
    "exp_avg complex": lambda s: _first(s, exp_avg=torch.ones(8, 64, dtype=torch.complex64)),
    "exp_avg sparse": lambda s: _first(s, exp_avg=torch.ones(8, 64).to_sparse()),
    "step negative": lambda s: _first(s, step=torch.tensor(-3.0)),
    "step NaN": lambda s: _first(s, step=torch.tensor(NAN)),
    "step of two": lambda s: _first(s, step=torch.ones(2)),
    "step text": lambda s: _first(s, step="two"),
    "lr NaN": lambda s: s["param_groups"][0].update(lr=NAN),
    "lr infinite": lambda s: s["param_groups"][0].update(lr=INF),
    "lr text": lambda s: s["param_groups"][0].update(lr="fast"),
    "lr None": lambda s: s["param_groups"][0].update(lr=None),
    "beta of 1": lambda s: s["param_groups"][0].update(betas=(1.0, 0.9)),
    "one beta": lambda s: s["param_groups"][0].update(betas=(0.9,)),
    "no betas": lambda s: s["param_groups"][0].pop("betas"),
    "eps negative": lambda s: s["param_groups"][0].update(eps=-1e-8),
    "weight_decay NaN": lambda s: s["param_groups"][0].update(weight_decay=NAN),
    "two groups": lambda s: s["param_groups"].append(copy.deepcopy(s["param_groups"][0])),
    "no groups": lambda s: s.pop("param_groups"),
    "no state": lambda s: s.pop("state"),
}


def damaged_loads(draw: random.Random) -> Case:
    """Refused, and the optimizer goes on as if nothing had been loaded."""
    setting = drawn(draw)._replace(shape=(8, 64))
    backend, name = backend_for(draw, setting), draw.choice(list(DAMAGE))

    def steps(load: bool) -> list[Tensor]:
        optimizer, params = setting.optimizer(True, backend)
        optimizer.set_unit_lr(params[0], 0.5)
        optimizer.step()
        if load:
            saved = copy.deepcopy(optimizer.state_dict())
            DAMAGE[name](saved)
            try:
                optimizer.load_state_dict(saved)
            except (ValueError, KeyError, RuntimeError):
                pass
            else:
                raise AssertionError(f"{name} was loaded")
        optimizer.step()
        return results(optimizer, params)

    return Case(f"{name}; {setting}, backend {backend}", lambda: steps(True), lambda: steps(False), valid=True, rtol=0, atol=0)


def copied_optimizers(draw: random.Random) -> Case:
    """deepcopy, pickle, and groups given to another optimizer go on where the first would."""
    import pickle

    setting = drawn(draw)
    backend, how = backend_for(draw, setting), draw.choice(("deepcopy", "pickle", "dict"))

    def steps(copying: bool) -> list[Tensor]:
        optimizer, params = setting.optimizer(True, backend)
        optimizer.set_unit_lr(params[1], torch.linspace(0.0, 1.7, 5))
        optimizer.step()
        if copying and how == "dict":
            before = optimizer.state_dict()
            optimizer = AdamW(params, **HYPER, **setting.options, **setting.own, backend=backend)
            optimizer.load_state_dict(before)
        elif copying:
            grads = [param.grad for param in params]
            optimizer = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            params = optimizer.param_groups[0]["params"]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        optimizer.step()
        return results(optimizer, params)

    return Case(f"{how}; {setting}, backend {backend}", lambda: steps(True), lambda: steps(False), valid=True, rtol=0, atol=0)


def pickled_damage(draw: random.Random) -> Case:
    """A state set by hand (__setstate__), as unpickling does."""
    setting: Setting = drawn(draw, low=False)._replace(shape=(8, 64))
    name = draw.choice([name for name in DAMAGE if name.startswith(("exp_avg", "step", "lr", "no exp"))])

    def steps() -> list[Tensor]:
        optimizer, params = setting.optimizer(True, "cpu")
        optimizer.step()
        state = optimizer.__getstate__()
        damaged = {"state": {0: dict(state["state"][params[0]])}, "param_groups": [dict(state["param_groups"][0])]}
        DAMAGE[name](damaged)
        optimizer.__setstate__(state | {"state": {params[0]: damaged["state"][0]}, "param_groups": damaged["param_groups"]})
        optimizer.step()
        return results(optimizer, params)

    return Case(f"{name}, by __setstate__; {setting}", steps, refused)


FAMILIES = (loaded_shapes, damaged_loads, copied_optimizers, pickled_damage)
