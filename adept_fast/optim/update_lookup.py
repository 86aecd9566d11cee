"""Looks up and checks what the update of one parameter needs: gradient, state, rates, shard and backend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.adamw.checks import CODES, REAL, SCALES, check_operands
from adept_fast.ops.adamw.eight_bit import row_length
from adept_fast.ops.adamw.memory_order import Operands
from adept_fast.ops.adamw.reference import AdamWOptions
from adept_fast.optim.arguments import check_dtypes, check_flags
from adept_fast.optim.state import RATES, Settings, check_placements, create_missing, state_format
from adept_fast.runtime import dtensor

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Any]]


def operands_of(settings: Settings, number: int, group: Group, position: int, first: int, states: States) -> Operands:
    """Look up and check a parameter's gradient, state (created if missing) and rates.

    number, position: of the group, and of the parameter in it.
    first: number of parameters in the groups before.
    """
    param, where = group["params"][position], f"group {number}, parameter {position}"
    if param.dtype not in REAL and not param.is_complex():
        raise InputError(f"{where} is {param.dtype}, which AdamW cannot update: give it no gradient")
    check_dtypes(where, param, settings.master_weights)
    backend = backend_of(settings, param)
    state, form = states[param], state_format(settings, group, param, backend)
    if CODES[0] in state or form.moments == torch.int8:
        check_flags(number, group, torch.int8)
    create_missing(where, state, param, form, group["amsgrad"])
    check_placements(where, param, state, form, group["amsgrad"])
    rates, dim = _fitting_rates(where, group, position, param)
    shard = dtensor.shard_of(param)
    eight_bit = CODES[0] in state
    exp_avg, exp_avg_sq = CODES if eight_bit else ("exp_avg", "exp_avg_sq")
    given = Operands(
        param=dtensor.local(param),
        grad=dtensor.local(param.grad, param),
        exp_avg=dtensor.local(state[exp_avg]),
        exp_avg_sq=dtensor.local(state[exp_avg_sq]),
        max_exp_avg_sq=dtensor.local(state["max_exp_avg_sq"]) if group["amsgrad"] else None,
        master=None if form.master_key is None else dtensor.local(state[form.master_key]),
        step=state["step"],
        multipliers=rates if shard is None or rates is None else shard.multipliers(rates, dim),
        dim=dim,
        first_index=0 if shard is None else shard.first_index,
        seed=first + position,
        mesh=None if shard is None else shard.mesh,
        backend=backend,
        exp_avg_scale=dtensor.local(state[SCALES[0]]) if eight_bit else None,
        exp_avg_sq_scale=dtensor.local(state[SCALES[1]]) if eight_bit else None,
        row=row_length(param.shape) if eight_bit else 0,
    )
    check_operands(where, given, settings.master_weights, backend)
    return given


def options_of(group: Group, settings: Settings) -> AdamWOptions:
    beta1, beta2 = group["betas"]
    return AdamWOptions(
        lr=scalar(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        master_weights=settings.master_weights,
    )


def scalar(value: float | Tensor) -> float | Tensor:
    """Return a tensor of one element as 0-d, a number unchanged."""
    return value.squeeze() if isinstance(value, Tensor) else value


def backend_of(settings: Settings, param: Tensor) -> str:
    """Choose the backend of `param`. fp64 on a GPU is updated by plain torch: the CUDA and Triton kernels have fp32, bf16 and fp16."""
    if settings.differentiable:
        return "torch"
    name = dispatch.resolve("adamw", param.device, settings.backend)
    if name in ("cuda", "triton") and not {torch.float64, torch.complex128}.isdisjoint((param.dtype, settings.state_dtype)):
        if settings.backend or os.environ.get(dispatch.OVERRIDE):
            raise InputError(f"backend={name!r}: float64 is updated by plain torch only; choose 'torch', or no backend")
        return "torch"
    return name


def _fitting_rates(where: str, group: Group, position: int, param: Tensor) -> tuple[Tensor | None, int]:
    """Return (multipliers, dim) of a parameter on its device, or (None, 0)."""
    if position not in group.get(RATES, {}):
        return None, 0
    rates, dim = group[RATES][position]
    if rates.shape != param.shape[dim : dim + rates.ndim]:
        raise InputError(
            f"{where}: unit_lr of shape {tuple(rates.shape)} from dim={dim} no longer fits the parameter, now of shape "
            f"{tuple(param.shape)}; set the rates again with set_unit_lr"
        )
    if rates.device != param.device:
        rates = rates.to(param.device)
        group[RATES][position] = (rates, dim)
    return rates, dim
