"""Plans of updates: the lookups of one step, reused in the next while nothing that they depend on has changed.

Looking up a parameter's backend, state, shard, memory order and rates takes about 20 us of Python. Validating a plan takes 2 us, of which
0.5 us compares addresses and sizes, column by column (Table). Tensors are read from the parameter, its gradient and its state at every
step, hyperparameters from the group.
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
    """The part of an update that is the same at every step, and the conditions for that.

    form, grad_form: dtype and strides of the parameter and of its gradient.
    row: Table.fingerprint's part of this update, from the step that was checked.
    References are weak, so that a plan keeps no state tensor alive.
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
    row: bytes = b""

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates | None, options: AdamWOptions) -> Update | None:
        """Return the update, or None if the plan is outdated."""
        exp_avg, exp_avg_sq, step = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
        of_max, of_master = self.max_exp_avg_sq, self.master
        max_exp_avg_sq = None if of_max is None else state.get("max_exp_avg_sq")
        master = None if of_master is None or self.master_key is None else state.get(self.master_key)
        if (
            step is None
            or rates is not self.rates
            or exp_avg is not self.exp_avg()
            or exp_avg is None  # a dead reference is None too
            or exp_avg_sq is not self.exp_avg_sq()
            or exp_avg_sq is None
            or (of_max is not None and (max_exp_avg_sq is None or max_exp_avg_sq is not of_max()))
            or (of_master is not None and (master is None or master is not of_master()))
            or (param.dtype, param.stride()) != self.form
            or grad.layout != torch.strided
            or (grad.dtype, grad.stride()) != self.grad_form
        ):
            return None
        # Positional, because keywords take 0.3 us longer. A test compares the order with Update's fields.
        return Update(
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step,
            self.multipliers, self.length, self.inner, self.first_index, self.seed, options,
        )  # fmt: skip


def plan_of(param: Tensor, given: Operands, update: Update, master_key: str | None, rates: Rates | None) -> Plan | None:
    """Plan the update of `param` that `in_memory` made of `given`.

    Returns None for shards, reordered copies and complex parameters, which are looked up at every step.
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
    """Return the indices of planned updates whose tensors are not the checked ones. Stores the rows of new plans."""
    now, found = table.fingerprint(), table.misfits()
    if None in plans or b"".join([plan.row for plan in plans if plan is not None]) != now:
        for i, plan in enumerate(plans):
            row = now[ROW_BYTES * i : ROW_BYTES * (i + 1)]
            if plan is not None and not plan.row:
                plan.row = row
            elif plan is not None and plan.row != row:
                found.add(i)
    return [i for i in sorted(found) if plans[i] is not None]
