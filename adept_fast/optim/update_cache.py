"""Updates described once and used again: what has not changed since the last step is not looked up anew.

Finding a parameter's backend, state, shard, memory order and rates costs Python some twenty microseconds; seeing that all of it still
holds, two. Tensors are taken from the parameter, its gradient and its state in every step, hyperparameters from the group.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from adept_fast.ops.adamw.op import Row
from adept_fast.ops.adamw.reference import AdamWOptions, Seen, Update

Rates = tuple[Tensor, int]  # multipliers, dim


class Plan(NamedTuple):
    """What an update is besides its tensors and hyperparameters, and what must not have changed for that to stay right.

    Nothing here keeps a parameter or a state tensor alive: whoever moves the state away wants its memory.
    """

    of: tuple[ref[Tensor] | None, ...]  # the tensors whose form is not looked at: exp_avg, exp_avg_sq, max_exp_avg_sq, master
    rest: tuple[Any, ...]  # the fields of Update from multipliers to seed
    place: tuple[torch.device, str]  # device, backend
    master_key: str | None
    rates: Rates | None
    form: tuple[Any, ...]  # dtype and strides of the parameter
    grad_form: tuple[Any, ...]  # dtype and strides of the gradient, which is dense
    seen: Seen  # where all of them lay, and how large they were

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates | None, options: AdamWOptions) -> Update | None:
        """The update, or None where the plan does not hold any more."""
        of_exp_avg, of_exp_avg_sq, of_max, of_master = self.of
        exp_avg, exp_avg_sq, step = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("step")
        max_exp_avg_sq = None if of_max is None else state.get("max_exp_avg_sq")
        master = None if of_master is None else state.get(self.master_key)
        if (
            exp_avg is None  # a reference to what is gone gives None too
            or exp_avg_sq is None
            or step is None
            or rates is not self.rates
            or exp_avg is not of_exp_avg()
            or exp_avg_sq is not of_exp_avg_sq()
            or (of_max is not None and (max_exp_avg_sq is None or max_exp_avg_sq is not of_max()))
            or (of_master is not None and (master is None or master is not of_master()))
            or (param.dtype, param.stride()) != self.form
            or grad.layout != torch.strided
            or (grad.dtype, grad.stride()) != self.grad_form
        ):
            return None
        return Update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step, *self.rest, options, self.seen)


def plan_of(param: Tensor, row: Row, update: Update, master_key: str | None, rates: Rates | None) -> Plan | None:
    """What `update`, made of `row`, is from step to step; None where it is not of the parameter, gradient and state themselves but of
    their shards, of copies in another order or of views as real: those are described in every step."""
    if update.seen is None or param is not row.param or not all(a is b for a, b in zip(update[:7], row[:7], strict=True)):
        return None
    if rates is not None and (update.multipliers is None or update.multipliers.data_ptr() != rates[0].data_ptr()):
        return None
    form = (param.dtype, param.stride())
    grad_form = (row.grad.dtype, row.grad.stride())
    of = tuple(None if tensor is None else ref(tensor) for tensor in row[2:6])
    return Plan(of, update[7:12], (param.device, row.backend), master_key, rates, form, grad_form, update.seen)
