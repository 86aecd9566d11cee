"""What AdamW keeps per parameter, and how it passes through a state dict with every key in its own dtype.

torch's load_state_dict casts floating states to the parameter's dtype; fp32 rates, fp32 moments and int16 remainders must not suffer that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adept_fast.runtime.dtensor import is_sharded

MASTER_KEYS = {"copy": "master", "remainder": "remainder", "kahan": "compensation"}
EDITED = ("remainder", "compensation")  # what an edit of the parameter makes stale
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
RATES = "unit_lr"  # in a group: {position: (multipliers, dim)}


@dataclass(frozen=True)
class Kept:
    """How one parameter's state is kept: where its step stands, the dtype of its moments, the key (or None) and dtype of its master."""

    step_device: torch.device
    moments: torch.dtype
    master_key: str | None
    master: torch.dtype


def create_missing(state: dict[str, Any], param: Tensor, kept: Kept, amsgrad: bool) -> None:
    """Add the keys that an update of `param` needs and `state` lacks."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=kept.step_device)
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            state[key] = torch.zeros_like(param, dtype=kept.moments, memory_format=torch.preserve_format).detach()
    if kept.master_key == "master" and "master" not in state:
        state["master"] = param.detach().to(kept.master)
    elif kept.master_key is not None and kept.master_key not in state:
        state[kept.master_key] = torch.zeros_like(param, dtype=kept.master).detach()


@dataclass(frozen=True)
class Uncast:
    """Carries a state tensor past torch's load_state_dict, which would cast it to the parameter's dtype."""

    tensor: Tensor


def rates_into_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State dict post-hook: rates of parameters that have a state go from their group into it."""
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
    """State dict post-hook: sharded remainders as int32, because neither NCCL nor gloo carries int16."""
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


def restored(state: dict[str, Any], kept: Kept, device: torch.device) -> dict[str, Any]:
    """A loaded state, unwrapped, each key in the dtype it is kept in; a master of another mode, or one that was cast, is left out."""
    result = {}
    for key, value in state.items():
        if key == "step":
            # torch 1.x kept it as a number.
            tensor = value.tensor if isinstance(value, Uncast) else torch.as_tensor(value)
            result[key] = tensor.to(kept.step_device, torch.float32, copy=isinstance(value, Uncast))
        elif not isinstance(value, Uncast):
            result[key] = value
        elif key in MASTER_KEYS.values():
            if key == kept.master_key and value.tensor.dtype in (kept.master, _carried(kept.master)):
                result[key] = value.tensor.to(device, kept.master, copy=True)
        else:
            dtypes = {"unit_lr": torch.float32} | dict.fromkeys(MOMENTS, kept.moments)
            result[key] = value.tensor.to(device, dtypes.get(key, value.tensor.dtype), copy=True)
    return result
