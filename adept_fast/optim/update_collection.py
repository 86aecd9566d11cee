"""What a step of AdamW updates: parameters with a gradient, their state, rates and backend, found anew or by an earlier step's plan."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch as backends
from adept_fast.ops.adamw.checks import check_row
from adept_fast.ops.adamw.op import Row, in_memory
from adept_fast.ops.adamw.planned_rows import Table
from adept_fast.ops.adamw.reference import AdamWOptions, Update, needs_master
from adept_fast.optim.arguments import DTYPES, check_dtypes, check_hyperparameters, refuse_sparse
from adept_fast.optim.state import EDITED, MASTER_KEYS, RATES, Kept, check_placed, create_missing
from adept_fast.optim.update_cache import Plan, plan_of
from adept_fast.runtime import dtensor

if TYPE_CHECKING:
    from adept_fast.ops.adamw.memory_order import Pair

    Place = tuple[torch.device, str]  # device, backend
    Work = dict[Place, list[Update]]
    Described = tuple[Update, Sequence[Pair], dtensor.Mesh | None, Place]


class Rows(torch.optim.Optimizer):
    """The part of AdamW, which see, that describes updates and carries none out."""

    state_dtype: torch.dtype | None
    master_weights: str | None
    backend: str | None
    _written: dict[Tensor, int]  # version counter after the last step, of parameters whose state an edit makes stale
    _plans: dict[int, tuple[tuple[Any, ...], dict[int, Plan | None]]]  # per group: what they rely on, by position

    def _collected(self) -> tuple[Work, dict[Place, Table], list[Pair], list[Tensor], list[dtensor.Mesh | None]]:
        """The updates of this step by device and backend, tables of those that native code reads, pairs (tensor, copy) to write back, and
        where gradients are clipped those and their meshes.

        Tensors that are still the same objects as when their update was planned, but not the same memory, are described anew."""
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            work, *rest = self._walked(self._described)
            return work, {}, *rest
        work, *rest = self._walked(self._planned)
        tables = {place: Table(updates) for place, updates in work.items()}
        changed = [updates[i].seed for place, updates in work.items() for i in tables[place].changed()]
        if changed:
            firsts = [0, *accumulate(len(group["params"]) for group in self.param_groups)]
            for number in changed:
                index = bisect_right(firsts, number) - 1
                self._plans[index][1].pop(number - firsts[index], None)
            work, *rest = self._walked(self._planned)
            tables = {place: Table(updates) for place, updates in work.items()}
        return work, tables, *rest

    def _walked(self, described: Callable[..., Iterator[Described]]) -> tuple[Work, list[Pair], list[Tensor], list[dtensor.Mesh | None]]:
        work: Work = {}
        copies, grads, meshes, first = [], [], [], 0
        for number, group in enumerate(self.param_groups):
            lr, beta1, beta2 = scalar(group["lr"]), *group["betas"]
            options = AdamWOptions(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"], self.master_weights)
            for update, copied, mesh, place in described(number, group, first, options):
                if place not in work:
                    work[place] = []
                work[place].append(update)
                if copied:
                    copies.extend(copied)
                if self.max_grad_norm is not None:
                    grads.append(update.grad)
                    meshes.append(mesh)
            first += len(group["params"])
        return work, copies, grads, meshes

    def _planned(self, number: int, group: dict[str, Any], first: int, options: AdamWOptions) -> Iterator[Described]:
        """(update, copies to write back, mesh, (device, backend)) of each parameter with a gradient, by its plan where that still holds."""
        check_hyperparameters(number, group)
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
            row = self._row(number, group, position, param, first)
            update, copies = in_memory(row, options)
            key = self._kept(group, param, row.backend).master_key
            plans[position] = plan_of(param, row, update, key, group[RATES].get(position) if RATES in group else None)
            yield update, copies, row.mesh, (update.param.device, row.backend)

    def _described(self, number: int, group: dict[str, Any], first: int, options: AdamWOptions) -> Iterator[Described]:
        """The same without plans, through a method that torch.compile knows."""
        columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [], [], [], [], [], [], [])
        self._init_group(group, first, number, *columns)
        for fields in zip(*columns, strict=True):
            row = Row(*fields)
            update, copies = in_memory(row, options)
            yield update, copies, row.mesh, (update.param.device, row.backend)

    def _init_group(self, group: dict[str, Any], first: int, number: int, *columns: list[Any]) -> None:
        """Append to the columns, one per field of Row, a row for each parameter with a gradient. torch.compile runs a method of this name
        while it traces, and guards what the lists then hold."""
        check_hyperparameters(number, group)
        refuse_sparse(group["params"])
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                for column, value in zip(columns, self._row(number, group, position, param, first), strict=True):
                    column.append(value)

    def _row(self, number: int, group: dict[str, Any], position: int, param: Tensor, first: int) -> Row:
        """A parameter with its gradient, state (created where missing) and rates, checked against each other; of a sharded one, this
        process's part."""
        where = f"group {number}, parameter {position}"
        if param.dtype not in DTYPES and not param.is_complex():
            raise InputError(f"{where} is {param.dtype}, which AdamW cannot update: give it no gradient")
        check_dtypes(where, param, self.master_weights)
        backend = self._backend(group, param)
        state, kept = self.state[param], self._kept(group, param, backend)
        create_missing(where, state, param, kept, group["amsgrad"])
        check_placed(where, param, state, kept, group["amsgrad"])
        rates, dim = group.get(RATES, {}).get(position, (None, 0))
        if rates is not None:
            if rates.shape != param.shape[dim : dim + rates.ndim]:
                raise InputError(
                    f"{where}: unit_lr of shape {tuple(rates.shape)} from dim={dim} no longer fits it, now of shape "
                    f"{tuple(param.shape)}; set them again with set_unit_lr"
                )
            if rates.device != param.device:
                rates = rates.to(param.device)
                group[RATES][position] = (rates, dim)
        shard = dtensor.shard_of(param)
        row = Row(
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
        check_row(where, row, self.master_weights, backend)
        self._reset_if_edited(param, kept.master_key)
        return row

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


def scalar(value: float | Tensor) -> float | Tensor:
    """A tensor of one element as a 0-d one; numbers as they are."""
    return value.squeeze() if isinstance(value, Tensor) else value
