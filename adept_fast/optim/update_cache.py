"""Plans of updates: what described one update describes the next, while nothing that it relies on has changed.

Finding a parameter's backend, state, shard, memory order and rates costs Python some twenty microseconds. Seeing that all of it still holds
costs two: half a microsecond of it compares addresses and sizes with those that were checked, column by column (Table). Tensors are taken
from the parameter, its gradient and its state in every step, hyperparameters from the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from adept_fast.ops.adamw.memory_order import Operands
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import ROW_BYTES, Table

Rates = tuple[Tensor, int]  # multipliers, dim
Place = tuple[torch.device, str]  # device, backend
Form = tuple[torch.dtype, tuple[int, ...]]  # dtype, strides


@dataclass(slots=True)
class Plan:
    """The part of an update that stays from step to step, and what must not have changed for that.

    References are weak: a plan keeps no state tensor alive.
    """

    exp_avg: ref[Tensor]
    exp_avg_sq: ref[Tensor]
    max_exp_avg_sq: ref[Tensor] | None
    master: ref[Tensor] | None
    master_key: str | None
    multipliers: Tensor | None
    length: int
    inner: int
    first_index: int
    seed: int
    place: Place
    rates: Rates | None
    form: Form
    grad_form: Form
    row: bytes = b""  # Table.fingerprint's, of the step that was checked

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates | None, options: AdamWOptions) -> Update | None:
        """The update, or None where the plan no longer holds."""
        exp_avg, exp_avg_sq, step = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
        of_max, of_master = self.max_exp_avg_sq, self.master
        max_exp_avg_sq = None if of_max is None else state.get("max_exp_avg_sq")
        master = None if of_master is None or self.master_key is None else state.get(self.master_key)
        if (
            step is None
            or rates is not self.rates
            or exp_avg is not self.exp_avg()
            or exp_avg is None  # a reference to what is gone gives None too
            or exp_avg_sq is not self.exp_avg_sq()
            or exp_avg_sq is None
            or (of_max is not None and (max_exp_avg_sq is None or max_exp_avg_sq is not of_max()))
            or (of_master is not None and (master is None or master is not of_master()))
            or (param.dtype, param.stride()) != self.form
            or grad.layout != torch.strided
            or (grad.dtype, grad.stride()) != self.grad_form
        ):
            return None
        # By position, in the order of Update's fields, which a test compares: keywords take a third of a microsecond longer.
        return Update(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step,
            self.multipliers, self.length, self.inner, self.first_index, self.seed, options,
        )  # fmt: skip


def plan_of(param: Tensor, given: Operands, update: Update, master_key: str | None, rates: Rates | None) -> Plan | None:
    """Plan the update of `param` that `in_memory` made of `given`.

    Returns None where the update is of shards, of copies in another order or of views as real: those are described in every step.
    """
    own = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")
    if param is not given.param or any(getattr(update, name) is not getattr(given, name) for name in own):
        return None
    if rates is not None and (update.multipliers is None or update.multipliers.data_ptr() != rates[0].data_ptr()):
        return None
    return Plan(
        exp_avg=ref(update.exp_avg),
        exp_avg_sq=ref(update.exp_avg_sq),
        max_exp_avg_sq=None if update.max_exp_avg_sq is None else ref(update.max_exp_avg_sq),
        master=None if update.master is None else ref(update.master),
        master_key=master_key,
        multipliers=update.multipliers,
        length=update.length,
        inner=update.inner,
        first_index=update.first_index,
        seed=update.seed,
        place=(param.device, given.backend),
        rates=rates,
        form=(param.dtype, param.stride()),
        grad_form=(given.grad.dtype, given.grad.stride()),
    )


def outdated(table: Table, plans: Sequence[Plan | None]) -> list[int]:
    """Indices of planned updates whose tensors are no longer those that were checked. A row seen for the first time is kept."""
    now, found = table.fingerprint(), table.misfits()
    if None in plans or b"".join([plan.row for plan in plans if plan is not None]) != now:
        for i, plan in enumerate(plans):
            row = now[ROW_BYTES * i : ROW_BYTES * (i + 1)]
            if plan is not None and not plan.row:
                plan.row = row
            elif plan is not None and plan.row != row:
                found.add(i)
    return [i for i in sorted(found) if plans[i] is not None]
