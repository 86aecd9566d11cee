"""The state of one parameter: its keys, dtypes and devices, how it is created, and which states are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import MASTER_DTYPES, REMEDY
from adept_fast.ops.adamw.reference import needs_master
from adept_fast.runtime.dtensor import is_sharded

MASTER_KEYS = {"copy": "master", "remainder": "remainder", "kahan": "compensation"}
STALE_AFTER_EDIT = ("remainder", "compensation")
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
RATES = "unit_lr"  # in a group: {position: (multipliers, dim)}


class Settings(NamedTuple):
    """The arguments of AdamW that are the same for all groups."""

    state_dtype: torch.dtype | None
    master_weights: str | None
    max_grad_norm: float | None
    backend: str | None
    differentiable: bool


class StateFormat(NamedTuple):
    """Device of `step`, dtype of the moments, key (None: no master) and dtype of the master."""

    step_device: torch.device
    moments: torch.dtype
    master_key: str | None
    master: torch.dtype


def state_format(settings: Settings, group: Mapping[str, Any], param: Tensor, backend: str) -> StateFormat:
    mode = settings.master_weights if needs_master(param) else None
    on_device = group["capturable"] or group["fused"] or backend in ("cuda", "triton")
    return StateFormat(
        step_device=param.device if on_device else torch.device("cpu"),
        moments=param.dtype if settings.state_dtype is None or param.is_complex() else settings.state_dtype,
        master_key=None if mode is None else MASTER_KEYS.get(mode),
        master=param.dtype if mode is None else MASTER_DTYPES.get(mode, param.dtype),
    )


def create_missing(where: str, state: dict[str, Any], param: Tensor, form: StateFormat, amsgrad: bool) -> None:
    """Create the keys that an update needs and `state` lacks: all before the first step, later those of an option switched on since.

    Raises InputError, naming `where`, for a state that has some of `step`, `exp_avg` and `exp_avg_sq` but not all.
    """
    missing = missing_keys(state)
    if missing and (len(missing) < 3 or "max_exp_avg_sq" in state):
        raise InputError(f"{where}: its state has {', '.join(map(str, state))} but no {' and no '.join(missing)}; {REMEDY}")
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=form.step_device)
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=form.moments, memory_format=torch.preserve_format).detach()
    if form.master_key == "master" and "master" not in state:
        state["master"] = param.detach().to(form.master)
    elif form.master_key is not None and form.master_key not in state:
        state[form.master_key] = torch.zeros_like(param, dtype=form.master).detach()


def missing_keys(state: Mapping[str, Any]) -> list[str]:
    return [key for key in ("step", *MOMENTS[:2]) if key not in state]


def check_placements(where: str, param: Tensor, state: dict[str, Any], form: StateFormat, amsgrad: bool) -> None:
    """Apply check_placement to every state tensor."""
    for key in (*MOMENTS[: 3 if amsgrad else 2], form.master_key):
        if key is not None:
            check_placement(where, key, state[key], param)


def check_placement(where: str, name: str, tensor: Tensor, param: Tensor) -> None:
    """Raise InputError unless both are plain tensors, or both DTensors of one mesh, placements and shape."""
    if not is_sharded(tensor) and not is_sharded(param):
        return
    if is_sharded(tensor) and is_sharded(param) and (tensor.device_mesh, tensor.placements) == (param.device_mesh, param.placements):
        if tensor.shape != param.shape:
            raise InputError(f"{where}: {name} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}; {REMEDY}")
        return
    found, expected = (f"a DTensor {tuple(x.placements)} on {x.device_mesh}" if is_sharded(x) else "no DTensor" for x in (tensor, param))
    raise InputError(f"{where}: {name} is {found}, its parameter {expected}; {REMEDY}")
