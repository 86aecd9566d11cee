"""State dicts of AdamW: tensors in their own dtypes, and the rates beside the state of their parameter.

torch's load_state_dict casts floating-point states to the parameter's dtype, which would round fp32 rates and moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import CODES, REMEDY, SCALES, check_count, check_form, check_scale
from adept_fast.ops.adamw.eight_bit import decode, encode, row_length
from adept_fast.optim.arguments import check_flags, check_hyperparameters, checked_multipliers, checked_rates
from adept_fast.optim.state import (
    MASTER_KEYS,
    MOMENTS,
    RATES,
    Settings,
    StateFormat,
    check_placement,
    check_rows_whole,
    missing_keys,
    state_format,
    zero_codes,
)
from adept_fast.optim.update_lookup import backend_of
from adept_fast.runtime import dtensor
from adept_fast.runtime.dtensor import is_sharded
from adept_fast.settings.validation import shown

Rates = dict[int, tuple[Tensor, int]]  # position -> (multipliers, dim)


@dataclass(frozen=True)
class Wrapped:
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


def widen_sharded_remainders(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State dict post-hook: widen sharded remainders to int32, because NCCL and gloo do not support int16."""
    for parameter, state in state_dict["state"].items():
        if isinstance(state, dict) and "remainder" in state and is_sharded(state["remainder"]):
            state_dict["state"][parameter] = state | {"remainder": state["remainder"].to(torch.int32)}


POST_HOOKS = (rates_into_state, widen_sharded_remainders)


def wrap_tensors(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Load pre-hook: wrap every state tensor, those of torchao's optimizers dequantised. `restore` unwraps them."""

    def wrap(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        return {key: Wrapped(_dequantized(value)) if isinstance(value, Tensor) else value for key, value in state.items()}

    return state_dict | {"state": {parameter: wrap(state) for parameter, state in state_dict["state"].items()}}


def _dequantized(value: Tensor) -> Tensor:
    return value if type(value).dequantize is Tensor.dequantize else value.dequantize()


@torch.no_grad()
def restore(settings: Settings, groups: Sequence[dict[str, Any]], states: Any, earlier_rates: Sequence[Rates | None]) -> None:
    """Check the loaded groups and convert the loaded states in place.

    earlier_rates: the rates of each group before the load, which stay if the loaded groups and states have none.
    Raises InputError, naming group and position, where something does not fit.
    """
    for number, group in enumerate(groups):
        check_hyperparameters(number, group)
        check_flags(number, group, settings.state_dtype)
        rates = checked_rates(f"group {number}", group, group.pop(RATES, {}))
        for position, param in enumerate(group["params"]):
            if param in states:
                where = f"group {number}, parameter {position}"
                state = _restored(where, param, states[param], state_format(settings, group, param, backend_of(settings, param)))
                if "unit_lr" in state:
                    multipliers, dim = state.pop("unit_lr"), state.pop("unit_dim", 0)
                    rates[position] = checked_multipliers(param, multipliers, dim, where=f"{where}: unit_lr")
                states[param] = state
        if rates:
            group[RATES] = rates
    if not any(group.get(RATES) for group in groups):
        for group, earlier in zip(groups, earlier_rates, strict=False):
            if earlier:
                group[RATES] = earlier


def _restored(where: str, param: Tensor, state: dict[str, Any], form: StateFormat) -> dict[str, Any]:
    """Unwrap a loaded state and convert each key to its own dtype. A master of another mode, or one that was cast, is left out.

    Raises InputError, naming `where`, for a state that is not AdamW's, lacks a key or does not fit `param`.
    """
    if not isinstance(state, dict):
        raise InputError(f"{where}: its state is a {type(state).__name__}, not a dict of step, exp_avg, exp_avg_sq")
    missing = missing_keys(state)
    if state and missing:
        keys = ", ".join(map(str, state))
        raise InputError(f"{where}: its state has {keys} but no {' and no '.join(missing)}: was it saved by an AdamW?")
    if CODES[0] in state:
        _check_codes(where, param, state)
    result: dict[str, Any] = {}
    for key, value in _recoded(where, param, state, form).items():
        tensor = _bare(value)
        if key == "step":
            result[key] = _restored_step(where, tensor, form.step_device, copy=isinstance(value, Wrapped))
        elif key in SCALES:
            result[key] = tensor.to(param.device, copy=True) if isinstance(value, Wrapped) else tensor
        elif key in (*MOMENTS, *CODES) or key == form.master_key:
            dtype = form.master if key == form.master_key else tensor.dtype if key in CODES else form.moments
            check_form(where, key, tensor, param)
            check_placement(where, key, tensor, param)
            if not isinstance(value, Wrapped):
                result[key] = tensor
            elif key in (*MOMENTS, *CODES) or tensor.dtype == dtype or (dtype, tensor.dtype) == (torch.int16, torch.int32):
                result[key] = tensor.to(param.device, dtype, copy=True)
        elif not isinstance(value, Wrapped):
            result[key] = value
        elif key not in MASTER_KEYS.values():
            result[key] = tensor if key == "unit_lr" else tensor.to(param.device, copy=True)
    return result


def _bare(value: Any) -> Any:
    return value.tensor if isinstance(value, Wrapped) else value


def _check_codes(where: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raise InputError unless 8-bit moments fit `param`, from whatever device they come."""
    for key in CODES:
        codes = _bare(state[key])
        check_form(where, key, codes, param)
        check_placement(where, key, codes, param)
        if codes.dtype != torch.uint8:
            raise InputError(f"{where}: {key} is {codes.dtype}, and must be uint8; {REMEDY}")
    local = dtensor.local(param)
    for key in SCALES:
        scale = dtensor.local(_bare(state[key]))
        elsewhere = isinstance(scale, Tensor) and scale.device.type != "meta"
        check_scale(where, key, scale, local, scale.device if elsewhere else local.device)


def _recoded(where: str, param: Tensor, state: dict[str, Any], form: StateFormat) -> dict[str, Any]:
    """Encode or decode loaded moments where `form` has the other kind. Those of a copied optimizer stay of their kind."""
    eight_bit = form.moments == torch.int8
    if not state or eight_bit == (CODES[0] in state):
        return state
    given = [state[key] for key in ((*MOMENTS[:2],) if eight_bit else (CODES[0], SCALES[0], CODES[1], SCALES[1]))]
    if not all(isinstance(value, Wrapped) for value in given):
        return state
    check_rows_whole(where, param)
    row, tensors = row_length(param.shape), [_bare(value) for value in given]
    for key, tensor in zip(MOMENTS, tensors if eight_bit else (), strict=False):
        check_form(where, key, tensor, param)
        check_placement(where, key, tensor, param)
    local = [dtensor.local(tensor).to(dtensor.local(param).device) for tensor in tensors]
    rest = {key: value for key, value in state.items() if key not in (*MOMENTS, *CODES, *SCALES)}
    if not eight_bit:
        m, m_scale, v, v_scale = local
        moments = decode(m, m_scale, v, v_scale, row)
        return rest | {key: Wrapped(dtensor.like(moment, param)) for key, moment in zip(MOMENTS, moments, strict=False)}
    made = zero_codes(where, param)
    m, v = local
    for key, value in zip((CODES[0], SCALES[0], CODES[1], SCALES[1]), encode(m.float(), v.float(), row), strict=True):
        dtensor.local(made[key]).copy_(value.view(dtensor.local(made[key]).shape))
    return rest | {key: Wrapped(tensor) for key, tensor in made.items()}


def _restored_step(where: str, value: Tensor | float, device: torch.device, copy: bool) -> Tensor:
    # torch 1.x saved a number.
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{where}: step is {shown(value)}, and must be a number; {REMEDY}") from None
    if tensor.numel() != 1 or tensor.is_complex() or tensor.device.type == "meta" != device.type:
        raise InputError(f"{where}: step is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, and must be one number")
    if tensor.device.type != "meta":
        check_count(where, tensor.item())
    return tensor.to(device, torch.float32, copy=copy)
