"""Updates described once and used again: what has not changed since the last step is not looked up anew.

Finding a parameter's backend, state, shard, memory order and rates costs Python some twenty microseconds; seeing that all of it still
holds, one or two. Gradients, whose memory a plan must not keep from being freed, and hyperparameters come anew in every step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adept_fast.optim.shards import Mesh
from adept_fast.reference import Update

Rates = tuple[Tensor, int]  # multipliers, dim


class Row(NamedTuple):
    """One parameter with a gradient, before its tensors are brought into one memory order; of a sharded one, this process's part."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    master: Tensor | None
    step: Tensor
    multipliers: Tensor | None
    dim: int
    first_index: int
    seed: int
    mesh: Mesh | None
    backend: str


class Plan(NamedTuple):
    """An update without its gradient and hyperparameters, and what must not have changed for it to stay right."""

    param: Tensor
    kept: tuple[Any, ...]  # the fields of Update from exp_avg to seed
    place: tuple[torch.device, str]  # device, backend
    master_key: str | None
    rates: Rates | None
    form: tuple[Any, ...]  # dtype, shape and strides of the parameter
    grad_form: tuple[Any, ...]  # layout, dtype and strides of the gradient

    def holds(self, param: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates | None) -> bool:
        exp_avg, exp_avg_sq, max_exp_avg_sq, master, step = self.kept[:5]
        return (
            param is self.param
            and rates is self.rates
            and state.get("exp_avg") is exp_avg
            and state.get("exp_avg_sq") is exp_avg_sq
            and state.get("step") is step
            and (max_exp_avg_sq is None or state.get("max_exp_avg_sq") is max_exp_avg_sq)
            and (master is None or state.get(self.master_key) is master)
            and param.device == self.place[0]
            and (param.dtype, param.shape, param.stride()) == self.form
            and (grad.layout, grad.dtype, grad.stride()) == self.grad_form
        )


def plan_of(param: Tensor, row: Row, update: Update, master_key: str | None, rates: Rates | None) -> Plan | None:
    """What `update`, made of `row`, is from step to step; None where it is not of the parameter, gradient and state themselves but of
    their shards, of copies in another order or of views as real: those are described in every step."""
    if param is not row.param or not all(a is b for a, b in zip(update[:7], row[:7], strict=True)):
        return None
    if rates is not None and (update.multipliers is None or update.multipliers.data_ptr() != rates[0].data_ptr()):
        return None
    form = (param.dtype, param.shape, param.stride())
    grad_form = (torch.strided, row.grad.dtype, row.grad.stride())
    return Plan(param, update[2:12], (param.device, row.backend), master_key, rates, form, grad_form)
