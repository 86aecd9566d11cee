"""The state of one parameter: its keys, dtypes and devices, how it is created, and which states are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.checks import CODES, MASTER_DTYPES, REMEDY, SCALES
from adept_fast.ops.adamw.eight_bit import row_dimension, scale_shape
from adept_fast.ops.adamw.masters import needs_master
from adept_fast.runtime.dtensor import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard as ShardPlacement

MASTER_KEYS = {"copy": "master", "remainder": "remainder", "remainder8": "remainder8", "kahan": "compensation"}
STALE_AFTER_EDIT = ("remainder", "remainder8", "compensation")
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
    """Device of `step`, dtype of the moments (int8: 8-bit codes), key (None: no master) and dtype of the master."""

    step_device: torch.device
    moments: torch.dtype
    master_key: str | None
    master: torch.dtype


def state_format(settings: Settings, group: Mapping[str, Any], param: Tensor, backend: str) -> StateFormat:
    mode = settings.master_weights if needs_master(param) else None
    on_device = group["capturable"] or group["fused"] or backend in ("cuda", "triton")
    moments = param.dtype if settings.state_dtype is None or param.is_complex() else settings.state_dtype
    if moments == torch.int8 and (param.dtype == torch.float64 or row_dimension(param.shape) is None):
        moments = torch.float64 if param.dtype == torch.float64 else torch.float32
    return StateFormat(
        step_device=param.device if on_device else torch.device("cpu"),
        moments=moments,
        master_key=None if mode is None else MASTER_KEYS.get(mode),
        master=param.dtype if mode is None else MASTER_DTYPES.get(mode, param.dtype),
    )


def create_missing(where: str, state: dict[str, Any], param: Tensor, form: StateFormat, amsgrad: bool) -> None:
    """Create the keys that an update needs and `state` lacks: all before the first step, later those of an option switched on since.

    Raises InputError, naming `where`, for a state that has some of `step`, `exp_avg` and `exp_avg_sq` but not all.
    """
    missing = missing_keys(state)
    if missing and (len(missing) < 3 or not {*state}.isdisjoint(("max_exp_avg_sq", *CODES, *SCALES))):
        raise InputError(f"{where}: its state has {', '.join(map(str, state))} but no {' and no '.join(missing)}; {REMEDY}")
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=form.step_device)
    if form.moments == torch.int8 and missing:
        state.update(zero_codes(where, param))
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state and not (key in MOMENTS[:2] and CODES[0] in state):
            state[key] = torch.zeros_like(param, dtype=form.moments, memory_format=torch.preserve_format).detach()
    if form.master_key == "master" and "master" not in state:
        state["master"] = param.detach().to(form.master)
    elif form.master_key is not None and form.master_key not in state:
        state[form.master_key] = torch.zeros_like(param, dtype=form.master).detach()


def missing_keys(state: Mapping[str, Any]) -> list[str]:
    """Return which of the keys that a state must have are missing."""
    needed = (*CODES, *SCALES) if any(key in state for key in CODES) else MOMENTS[:2]
    return [key for key in ("step", *needed) if key not in state]


def zero_codes(where: str, param: Tensor) -> dict[str, Tensor]:
    """Create 8-bit moments of zero, sharded as `param` is. Raises InputError for a parameter whose rows are cut."""
    check_rows_whole(where, param)
    shape = scale_shape(param.shape)
    if is_sharded(param):
        from torch.distributed.tensor import zeros

        def make(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return zeros(size, dtype=dtype, device_mesh=param.device_mesh, placements=param.placements)
    else:

        def make(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=param.device)

    return {key: make(tuple(param.shape), torch.uint8) for key in CODES} | {key: make(shape, torch.float32) for key in SCALES}


def check_rows_whole(where: str, param: Tensor) -> None:
    """Raise InputError for a DTensor whose placements cut the rows of 8-bit moments."""
    dim = row_dimension(param.shape)
    if dim is not None and is_sharded(param):
        cut = [each for each in param.placements if each.is_shard() and cast("ShardPlacement", each).dim % param.ndim >= dim]
        if cut:
            raise InputError(
                f"{where} of shape {tuple(param.shape)} is cut by {cut[0]} within its rows, whose blocks 8-bit moments keep whole; "
                "give it moments of another state_dtype"
            )


def check_placements(where: str, param: Tensor, state: dict[str, Any], form: StateFormat, amsgrad: bool) -> None:
    """Apply check_placement to every state tensor."""
    for key in (*(CODES if CODES[0] in state else MOMENTS[:2]), *MOMENTS[2 : 3 if amsgrad else 2], form.master_key):
        if key is not None:
            check_placement(where, key, state[key], param)
    if CODES[0] in state:
        check_rows_whole(where, param)


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
