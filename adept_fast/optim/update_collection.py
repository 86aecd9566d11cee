"""What a step of AdamW updates: parameters with a gradient, their state, rates and backend, found anew or by an earlier step's plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch as backends
from adept_fast.ops.adamw.op import in_memory
from adept_fast.ops.adamw.reference import AdamWOptions, Update, needs_master
from adept_fast.optim.arguments import DTYPES, refuse_sparse
from adept_fast.optim.state import EDITED, MASTER_KEYS, RATES, Kept, create_missing
from adept_fast.optim.update_cache import Plan, Row, plan_of
from adept_fast.runtime import dtensor

if TYPE_CHECKING:
    from adept_fast.ops.adamw.memory_order import Pair

    Described = tuple[Update, Sequence[Pair], dtensor.Mesh | None, tuple[torch.device, str]]


class Rows(torch.optim.Optimizer):
    """The part of AdamW, which see, that describes updates and carries none out."""

    state_dtype: torch.dtype | None
    master_weights: str | None
    backend: str | None
    _written: dict[Tensor, int]  # version counter after the last step, of parameters whose state an edit makes stale
    _plans: dict[int, tuple[tuple[Any, ...], dict[int, Plan | None]]]  # per group: what they rely on, by position

    def _planned(self, number: int, group: dict[str, Any], first: int, options: AdamWOptions) -> Iterator[Described]:
        """(update, copies to write back, mesh, (device, backend)) of each parameter with a gradient, by its plan where that still holds."""
        settings = (self.backend, os.environ.get(backends.OVERRIDE), self.master_weights, group["amsgrad"], first)
        if number not in self._plans or self._plans[number][0] != settings:
            self._plans[number] = settings, {}
        plans = self._plans[number][1]
        dense = False
        for position, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            plan = plans.get(position)
            rates = group[RATES].get(position) if RATES in group else None
            update = None if plan is None else plan.update(param, grad, self.state[param], rates, options)
            if update is not None:
                self._reset_if_edited(param, plan.master_key)
                yield update, (), None, plan.place
                continue
            if not dense:
                refuse_sparse(group["params"])
                dense = True
            row = self._row(group, position, param, first)
            update, copies = in_memory(row, options)
            key = self._kept(group, param, row.backend).master_key
            plans[position] = plan_of(param, row, update, key, group[RATES].get(position) if RATES in group else None)
            yield update, copies, row.mesh, (update.param.device, row.backend)

    def _described(self, number: int, group: dict[str, Any], first: int, options: AdamWOptions) -> Iterator[Described]:
        """The same without plans, through a method that torch.compile knows."""
        columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [], [], [], [], [], [], [])
        self._init_group(group, first, *columns)
        for fields in zip(*columns, strict=True):
            row = Row(*fields)
            update, copies = in_memory(row, options)
            yield update, copies, row.mesh, (update.param.device, row.backend)

    def _init_group(self, group: dict[str, Any], first: int, *columns: list[Any]) -> None:
        """Append to the columns, one per field of Row, a row for each parameter with a gradient. torch.compile runs a method of this name
        while it traces, and guards what the lists then hold."""
        refuse_sparse(group["params"])
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                for column, value in zip(columns, self._row(group, position, param, first), strict=True):
                    column.append(value)

    def _row(self, group: dict[str, Any], position: int, param: Tensor, first: int) -> Row:
        """A parameter with its gradient, state (created where missing) and rates; of a sharded one, this process's part."""
        if param.dtype not in DTYPES and not param.is_complex():
            raise InputError(f"parameter {position} of its group is {param.dtype}, which AdamW cannot update: give it no gradient")
        backend = self._backend(group, param)
        state, kept = self.state[param], self._kept(group, param, backend)
        create_missing(state, param, kept, group["amsgrad"])
        self._reset_if_edited(param, kept.master_key)
        rates, dim = group.get(RATES, {}).get(position, (None, 0))
        if rates is not None:
            if rates.shape != param.shape[dim : dim + rates.ndim]:
                raise InputError(
                    f"unit_lr: multipliers of shape {tuple(rates.shape)} from dim={dim} no longer fit parameter {position} of its "
                    f"group, now of shape {tuple(param.shape)}; set them again with set_unit_lr"
                )
            if rates.device != param.device:
                rates = rates.to(param.device)
                group[RATES][position] = (rates, dim)
        shard = dtensor.shard_of(param)
        return Row(
            dtensor.local(param),
            dtensor.local(param.grad, param),
            dtensor.local(state["exp_avg"]),
            dtensor.local(state["exp_avg_sq"]),
            dtensor.local(state["max_exp_avg_sq"]) if group["amsgrad"] else None,
            None if kept.master_key is None else dtensor.local(state[kept.master_key]),
            state["step"],
            rates if shard is None or rates is None else shard.multipliers(rates, dim),
            dim,
            0 if shard is None else shard.first_index,
            first + position,
            None if shard is None else shard.mesh,
            backend,
        )

    def _reset_if_edited(self, param: Tensor, master_key: str | None) -> None:
        """Zero a remainder or compensation whose parameter was written to since the last step."""
        if master_key in EDITED and self._written.get(param, param._version) != param._version:
            self.state[param][master_key].zero_()

    def _backend(self, group: dict[str, Any], param: Tensor) -> str:
        """What updates `param`; native code and Triton keep to fp32, bf16 and fp16 on GPUs, fp64 is left to plain torch there."""
        if self.defaults["differentiable"]:
            return "torch"
        name = backends.resolve("adamw", param.device, self.backend)
        if name in ("cuda", "triton") and not {torch.float64, torch.complex128}.isdisjoint((param.dtype, self.state_dtype)):
            if self.backend or os.environ.get(backends.OVERRIDE):
                raise InputError(f"backend={name!r}: float64 is updated by plain torch only; leave the backend open or choose 'torch'")
            return "torch"
        return name

    def _kept(self, group: dict[str, Any], param: Tensor, backend: str) -> Kept:
        """How the state of `param` is kept here."""
        moments = param.dtype if self.state_dtype is None or param.is_complex() else self.state_dtype
        key = MASTER_KEYS.get(self.master_weights) if needs_master(param) else None
        master = {"copy": torch.float32, "remainder": torch.int16}.get(self.master_weights, param.dtype)
        on_device = group["capturable"] or group["fused"] or backend in ("cuda", "triton")
        return Kept(param.device if on_device else torch.device("cpu"), moments, key, master)
