"""Collects the updates of a step: parameters with a gradient, their state, rates and backend, looked up or from a cached plan."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.adamw.checks import REAL, check_operands
from adept_fast.ops.adamw.memory_order import Operands, Pair, in_memory
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import Table
from adept_fast.optim.arguments import check_dtypes, check_hyperparameters, check_keys, check_own_arguments, refuse_sparse
from adept_fast.optim.state import RATES, STALE_AFTER_EDIT, Settings, check_placements, create_missing, state_format
from adept_fast.optim.update_cache import Place, Plan, outdated, plan_of
from adept_fast.runtime import dtensor

Group = dict[str, Any]
States = Mapping[Tensor, dict[str, Any]]


@dataclass
class Batch:
    """Updates on one device by one backend. plans: that of each update; None: it is not cached."""

    updates: list[Update] = field(default_factory=list)
    plans: list[Plan | None] = field(default_factory=list)
    table: Table | None = None


@dataclass
class StepUpdates:
    """All updates of a step.

    clipped: whether gradients are clipped.
    copies: (tensor, copy): copies to write back after the step.
    grads, meshes: if clipped, each gradient and the mesh that it is sharded over.
    """

    clipped: bool
    batches: dict[Place, Batch] = field(default_factory=dict)
    copies: list[Pair] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    meshes: list[dtensor.Mesh | None] = field(default_factory=list)

    def add(self, place: Place, update: Update, plan: Plan | None, mesh: dtensor.Mesh | None) -> None:
        if place not in self.batches:
            self.batches[place] = Batch()
        batch = self.batches[place]
        batch.updates.append(update)
        batch.plans.append(plan)
        if self.clipped:
            self.grads.append(update.grad)
            self.meshes.append(mesh)

    def add_described(self, given: Operands, options: AdamWOptions) -> Update:
        """Append the update of `given`, without a plan."""
        update, copies = in_memory(given, options)
        self.copies.extend(copies)
        self.add((update.param.device, given.backend), update, None, given.mesh)
        return update


@dataclass
class GroupPlans:
    """The plans of one group by position. They are valid only for these settings."""

    settings: tuple[Any, ...]
    plans: dict[int, Plan | None] = field(default_factory=dict)


class UpdateCollector:
    """Collects the updates of each step. Caches plans, and the version counter of each parameter after the last step."""

    def __init__(self) -> None:
        self.plans: dict[int, GroupPlans] = {}  # by number of group
        self.written: dict[Tensor, int] = {}

    def collect(self, settings: Settings, groups: Sequence[Group], states: States) -> StepUpdates:
        """Collect the updates of this step, with the table of each batch.

        A second pass looks up the tensors whose memory changed although the Python object is the planned one.
        """
        try:
            step = self._walk(settings, groups, states)
        except KeyError:
            for number, group in enumerate(groups):
                check_keys(number, group)
            raise
        changed = [batch.updates[i].seed for batch in step.batches.values() for i in _tabulated(batch)]
        if changed:
            firsts = [0, *accumulate(len(group["params"]) for group in groups)]
            for seed in changed:
                number = bisect_right(firsts, seed) - 1
                self.plans[number].plans.pop(seed - firsts[number], None)
            step = self._walk(settings, groups, states)
            for batch in step.batches.values():
                batch.table = Table(batch.updates)
        return step

    def _walk(self, settings: Settings, groups: Sequence[Group], states: States) -> StepUpdates:
        step, first = StepUpdates(settings.max_grad_norm is not None), 0
        for number, group in enumerate(groups):
            check_hyperparameters(number, group)
            options = options_of(group, settings)
            relied_on = (settings, os.environ.get(dispatch.OVERRIDE), group["amsgrad"], first)
            if number not in self.plans or self.plans[number].settings != relied_on:
                check_own_arguments(settings.state_dtype, settings.master_weights, settings.max_grad_norm)
                self.plans[number] = GroupPlans(relied_on)
            plans = self.plans[number].plans
            rates = group.get(RATES, {})
            dense = False
            for position, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                plan = plans.get(position)
                update = None if plan is None else plan.update(param, grad, states[param], rates.get(position), options)
                if plan is not None and update is not None:
                    self.reset_if_edited(states, param, plan.master_key)
                    step.add(plan.place, update, plan, None)
                    continue
                if not dense:
                    refuse_sparse(group["params"])
                    dense = True
                given = self.describe(settings, number, group, position, first, states)
                update, copies = in_memory(given, options)
                key = state_format(settings, group, param, given.backend).master_key
                plan = plans[position] = plan_of(param, given, update, key, rates.get(position))
                step.copies.extend(copies)
                step.add((update.param.device, given.backend), update, plan, given.mesh)
            first += len(group["params"])
        return step

    def describe(self, settings: Settings, number: int, group: Group, position: int, first: int, states: States) -> Operands:
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
        create_missing(where, state, param, form, group["amsgrad"])
        check_placements(where, param, state, form, group["amsgrad"])
        rates, dim = _fitting_rates(where, group, position, param)
        shard = dtensor.shard_of(param)
        given = Operands(
            param=dtensor.local(param),
            grad=dtensor.local(param.grad, param),
            exp_avg=dtensor.local(state["exp_avg"]),
            exp_avg_sq=dtensor.local(state["exp_avg_sq"]),
            max_exp_avg_sq=dtensor.local(state["max_exp_avg_sq"]) if group["amsgrad"] else None,
            master=None if form.master_key is None else dtensor.local(state[form.master_key]),
            step=state["step"],
            multipliers=rates if shard is None or rates is None else shard.multipliers(rates, dim),
            dim=dim,
            first_index=0 if shard is None else shard.first_index,
            seed=first + position,
            mesh=None if shard is None else shard.mesh,
            backend=backend,
        )
        check_operands(where, given, settings.master_weights, backend)
        self.reset_if_edited(states, param, form.master_key)
        return given

    def reset_if_edited(self, states: States, param: Tensor, master_key: str | None) -> None:
        """Zero the remainder or compensation of a parameter that was edited since the last step.

        Raises RuntimeError during the capture of a CUDA graph, every replay of which would zero it again.
        """
        if master_key in STALE_AFTER_EDIT and self.written.get(param, param._version) != param._version:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a parameter was edited in place since the last step: run a step before the capture of a CUDA graph")
            states[param][master_key].zero_()

    def note_versions(self, groups: Sequence[Group]) -> None:
        """Store the version counters of the updated parameters."""
        for group in groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.written[param] = param._version


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


def _tabulated(batch: Batch) -> list[int]:
    """Build the table of a batch. Returns the indices of updates whose plan is outdated."""
    batch.table = Table(batch.updates)
    return outdated(batch.table, batch.plans)


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
