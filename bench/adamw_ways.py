"""The AdamWs that are timed side by side on one set-up: how each is made, and what is known of its formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adept_fast.optim import AdamW
from bench.adamw_others import OTHERS
from bench.adamw_setups import HYPER, SETUPS, Setup, blocks, multipliers

Make = Callable[[list[Parameter]], Optimizer]
NO_CLIPPING = 1e9  # the norm is taken, and nothing is scaled


@dataclass(frozen=True)
class Way:
    """make: an optimizer for parameters that have gradients.

    compared: the same for the comparison with fp64, in which `dim` is the dimension with rates by adamw_setups.multipliers; None: without.
    margin, moments, master: see adamw_truth.distances.
    floor: bytes a parameter that a step must move; None: counted from its state.
    shares: the way whose state it uses. copied: has parameters of its own, `shift` elements after an aligned address.
    """

    make: Make
    compared: Make | None
    dim: int | None = None
    margin: str = "other"
    moments: str | None = None
    master: bool = False
    floor: float | None = None
    shares: str = ""
    copied: bool = False
    shift: int = 0


def ways_of(name: str, units: int, device: torch.device, backend: str | None) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways of a set-up, and those that are left out, with the reason.

    torch has no counterpart for the set-ups that mix dtypes or keep a master.
    """
    setup = SETUPS[name]
    found = _ours(setup, units, backend)
    if setup.against:
        found["ours_against"] = _plain(SETUPS[setup.against], backend)
    if setup.state_dtype is None and setup.master_weights is None:
        found |= _torchs(units)
    others = {way: other for way, other in OTHERS.items() if name in other.setups}
    left_out = {way: reason for way, other in others.items() if (reason := other.missing(device))}
    for way, other in others.items():
        if way not in left_out:  # edits by others would reset a master of ours
            known = {"margin": other.margin, "moments": other.moments, "master": other.master}
            found[way] = Way(other.make, other.make, **known, copied=setup.master_weights is not None)
    return found, left_out


def _plain(setup: Setup, backend: str | None, **changes: Any) -> Way:
    make = partial(_adamw, setup, backend)
    mode = setup.master_weights
    known = {
        "margin": mode if mode in ("stochastic", "kahan") else "ours",
        "moments": "8 bits" if setup.state_dtype == "int8" else None,
        "master": mode not in (None, "stochastic"),
    }
    return Way(**{"make": make, "compared": make, "floor": setup.floor} | known | changes)


def _ours(setup: Setup, units: int, backend: str | None) -> dict[str, Way]:
    rows, columns = (partial(_adamw, setup, backend, dim=dim) for dim in (0, 1))
    by_unit = partial(_adamw, setup, backend, units=units)
    clipped = partial(_adamw, setup, backend, max_grad_norm=NO_CLIPPING)
    plain = partial(_plain, setup, backend)
    return {
        "ours": plain(),
        "units": plain(make=by_unit, compared=rows, dim=0, shares="ours"),
        "rows": plain(make=rows, compared=rows, dim=0, shares="ours"),
        "columns": plain(make=columns, compared=columns, dim=1, shares="ours"),
        "clipped": plain(make=clipped, compared=clipped, shares="ours"),
        "misaligned": plain(copied=True, shift=1),
    }


def _adamw(
    setup: Setup, backend: str | None, params: list[Parameter], dim: int | None = None, units: int | None = None, **options: Any
) -> AdamW:
    optimizer = AdamW(params, **HYPER, **setup.options, backend=backend, **options)
    device = params[0].device
    if units is not None:
        for param, (rows, values) in zip(params, _cut(params, units), strict=True):
            optimizer.set_unit_lr(param, values.repeat_interleave(torch.tensor(rows, device=device)))
    elif dim is not None:
        for param in params:
            along = min(dim, param.ndim - 1)
            optimizer.set_unit_lr(param, multipliers(param.shape[along], device), along)
    return optimizer


def _cut(params: list[Parameter], units: int) -> list[tuple[list[int], Tensor]]:
    """Return for each parameter the rows and the multipliers of its units."""
    cut = blocks([tuple(p.shape) for p in params], units)
    return list(zip(cut, multipliers(units, params[0].device).split([len(rows) for rows in cut]), strict=True))


class _Clipping(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], NO_CLIPPING)
        return super().step(closure)


def _torchs(units: int) -> dict[str, Way]:
    def group_per_unit(params: list[Parameter]) -> Optimizer:
        groups = []
        for param, (rows, values) in zip(params, _cut(params, units), strict=True):
            for part, grad, value in zip(param.detach().split(rows), param.grad.split(rows), values.tolist(), strict=True):
                unit = Parameter(part)
                unit.grad = grad
                groups.append({"params": [unit], "lr": HYPER["lr"] * value})
        return torch.optim.AdamW(groups, **HYPER, fused=True)

    foreach, fused = (partial(torch.optim.AdamW, **HYPER, **{name: True}) for name in ("foreach", "fused"))
    clipping = partial(_Clipping, **HYPER, fused=True)
    return {
        "torch_foreach": Way(foreach, foreach),
        "torch_fused": Way(fused, fused),
        "torch_group_per_unit": Way(group_per_unit, None),
        "torch_clip_and_fused": Way(clipping, clipping, shares="torch_fused"),
    }
