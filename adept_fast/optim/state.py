"""AdamW's state per parameter, and its way through a state dict with every key in its own dtype.

torch's load_state_dict casts floating-point states to the parameter's dtype, which would round fp32 rates and moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import MASTER_DTYPES, REMEDY, check_count, check_form
from adept_fast.ops.adamw.reference import needs_master
from adept_fast.runtime.dtensor import is_sharded

MASTER_KEYS = {"copy": "master", "remainder": "remainder", "kahan": "compensation"}
EDITED = ("remainder", "compensation")  # stale once the parameter is edited
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
RATES = "unit_lr"  # in a group: {position: (multipliers, dim)}


class Settings(NamedTuple):
    """The arguments of AdamW, by their names, that hold for every group."""

    state_dtype: torch.dtype | None
    master_weights: str | None
    max_grad_norm: float | None
    backend: str | None
    differentiable: bool


class StateFormat(NamedTuple):
    """The form of one parameter's state: the device of its step, the dtype of its moments, the key and dtype of its master."""

    step_device: torch.device
    moments: torch.dtype
    master_key: str | None
    master: torch.dtype


def state_format(settings: Settings, group: Mapping[str, Any], param: Tensor, backend: str) -> StateFormat:
    """The form that the state of `param` has here."""
    mode = settings.master_weights if needs_master(param) else None
    on_device = group["capturable"] or group["fused"] or backend in ("cuda", "triton")
    return StateFormat(
        step_device=param.device if on_device else torch.device("cpu"),
        moments=param.dtype if settings.state_dtype is None or param.is_complex() else settings.state_dtype,
        master_key=None if mode is None else MASTER_KEYS.get(mode),
        master=param.dtype if mode is None else MASTER_DTYPES.get(mode, param.dtype),
    )


def create_missing(where: str, state: dict[str, Any], param: Tensor, kept: StateFormat, amsgrad: bool) -> None:
    """Add the keys that an update of `param` needs and `state` lacks.

    Those are all keys before the first step, and later the keys of an option that was switched on.
    Raises InputError, naming `where`, for a state that has lost a part.
    """
    check_complete(where, state)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=kept.step_device)
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=kept.moments, memory_format=torch.preserve_format).detach()
    if kept.master_key == "master" and "master" not in state:
        state["master"] = param.detach().to(kept.master)
    elif kept.master_key is not None and kept.master_key not in state:
        state[kept.master_key] = torch.zeros_like(param, dtype=kept.master).detach()


def check_complete(where: str, state: dict[str, Any]) -> None:
    """Raise InputError where some of `step`, `exp_avg` and `exp_avg_sq` are there and others are not."""
    missing = [key for key in ("step", *MOMENTS[:2]) if key not in state]
    if missing and (len(missing) < 3 or "max_exp_avg_sq" in state):
        raise InputError(f"{where}: its state has {', '.join(map(str, state))} but no {' and no '.join(missing)}; {REMEDY}")


def check_placed(where: str, param: Tensor, state: dict[str, Any], kept: StateFormat, amsgrad: bool) -> None:
    """Raise InputError unless each state tensor has the mesh and placements of its parameter, or both are plain."""
    for key in (*MOMENTS[: 3 if amsgrad else 2], kept.master_key):
        if key is not None:
            check_cut(where, key, state[key], param)


def check_cut(where: str, name: str, tensor: Tensor, param: Tensor) -> None:
    """Raise InputError unless `tensor` is a DTensor of the mesh and placements of `param`, or both are plain."""
    if not (is_sharded(tensor) and is_sharded(param)):
        if not is_sharded(tensor) and not is_sharded(param):
            return
        raise InputError(f"{where}: {name} is {_cut(tensor)}, its parameter {_cut(param)}; {REMEDY}")
    if tensor.device_mesh != param.device_mesh or tensor.placements != param.placements:
        raise InputError(f"{where}: {name} is {_cut(tensor)}, its parameter {_cut(param)}; {REMEDY}")
    if tensor.shape != param.shape:
        raise InputError(f"{where}: {name} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}; {REMEDY}")


def _cut(tensor: Tensor) -> str:
    return f"a DTensor {tuple(tensor.placements)} on {tensor.device_mesh}" if is_sharded(tensor) else "no DTensor"


@dataclass(frozen=True)
class Uncast:
    """Hides a state tensor from torch's load_state_dict, which would cast it to the parameter's dtype."""

    tensor: Tensor


def rates_into_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State dict post-hook: move the rates of parameters that have a state from their group into it."""
    states = state_dict["state"]
    for group in state_dict["param_groups"]:
        waiting = {}
        for position, (multipliers, dim) in group.pop(RATES, {}).items():
            parameter = group["params"][position]
            if states.get(parameter):
                states[parameter] = states[parameter] | {"unit_lr": multipliers, "unit_dim": dim}
            else:
                waiting[position] = (multipliers, dim)
        if waiting:
            group[RATES] = waiting


def _carried(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.int16 else dtype


def widen_sharded_remainders(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State dict post-hook: widen sharded remainders to int32, because neither NCCL nor gloo carries int16."""
    for parameter, state in state_dict["state"].items():
        if isinstance(state, dict) and "remainder" in state and is_sharded(state["remainder"]):
            state_dict["state"][parameter] = state | {"remainder": state["remainder"].to(torch.int32)}


def protect_from_cast(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Load pre-hook: wrap every state tensor, to be unwrapped by `restored`."""

    def wrap(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {key: Uncast(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    return state_dict | {"state": {parameter: wrap(state) for parameter, state in state_dict["state"].items()}}


def restored(where: str, param: Tensor, state: dict[str, Any], kept: StateFormat) -> dict[str, Any]:
    """Unwrap a loaded state and convert each key to its own dtype. A master of another mode, or one that was cast, is left out.

    Raises InputError, naming `where`, for a state that is not AdamW's, lacks a key or does not fit `param`.
    """
    if not isinstance(state, dict):
        raise InputError(f"{where}: its state is a {type(state).__name__}, not a dict of step, exp_avg, exp_avg_sq")
    missing = [key for key in ("step", *MOMENTS[:2]) if key not in state]
    if state and missing:
        keys = ", ".join(map(str, state))
        raise InputError(f"{where}: its state has {keys} but no {' and no '.join(missing)}: was it saved by an AdamW?")
    result = {}
    for key, value in state.items():
        tensor = value.tensor if isinstance(value, Uncast) else value
        if key == "step":
            result[key] = _restored_step(where, tensor, kept.step_device, copy=isinstance(value, Uncast))
        elif key in MOMENTS or key == kept.master_key:
            dtype = kept.moments if key in MOMENTS else kept.master
            check_form(where, key, tensor, param)
            check_cut(where, key, tensor, param)
            if not isinstance(value, Uncast):
                result[key] = tensor
            elif key in MOMENTS or tensor.dtype in (dtype, _carried(dtype)):
                result[key] = tensor.to(param.device, dtype, copy=True)
        elif not isinstance(value, Uncast):
            result[key] = value
        elif key not in MASTER_KEYS.values():
            result[key] = tensor if key == "unit_lr" else tensor.to(param.device, copy=True)
    return result


def _restored_step(where: str, value: Tensor | float, device: torch.device, copy: bool) -> Tensor:
    # torch 1.x kept it as a number.
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{where}: step is {value!r}, and must be a number; {REMEDY}") from None
    if tensor.numel() != 1 or tensor.is_complex() or tensor.device.type == "meta" != device.type:
        raise InputError(f"{where}: step is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, and must be one number")
    if tensor.device.type != "meta":
        check_count(where, tensor.item())
    return tensor.to(device, torch.float32, copy=copy)
