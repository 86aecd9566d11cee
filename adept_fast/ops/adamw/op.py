"""The way of an update from tensors of any layout to the backend that carries it out, in eager mode and through torch.compile.

A backend is a function of (table of updates, grad_scale, found_inf), all on one device: it advances every `step` and updates, with
gradients multiplied by `grad_scale` (fp64, 0-d) first; where `found_inf` (fp32, 0-d) is not 0 it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops import dispatch
from adept_fast.ops.adamw import reference
from adept_fast.ops.adamw.checks import check_count, check_row
from adept_fast.ops.adamw.memory_order import Pair, in_one_order, unit_walk
from adept_fast.ops.adamw.planned_rows import Table
from adept_fast.ops.adamw.reference import AdamWOptions, Seen, Update
from adept_fast.runtime.dtensor import Mesh


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


def in_memory(row: Row, options: AdamWOptions) -> tuple[Update, list[Pair]]:
    """The update with all tensors real and in one memory order, and (original, copy) of those that were copied for that and are written to.

    `row.multipliers` covers dimensions dim .. dim + ndim - 1 of the parameter."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step, multipliers, dim, first_index, seed = row[:11]
    if param.numel() == 0:
        multipliers = None
    walk = None if multipliers is None else unit_walk(param, multipliers, dim)
    if grad.is_complex():
        grad = grad.resolve_conj()
    elif grad.dtype == torch.float64 != param.dtype:
        grad = grad.float()  # what the arithmetic is in
    grad = grad.resolve_neg()
    tensors = [param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master]
    tensors, copies = in_one_order(tensors, row_major=multipliers is not None and walk is None)
    if multipliers is not None and tensors[0] is not param:
        walk = unit_walk(tensors[0], multipliers, dim)
    length, inner = walk or (1, 1)
    if param.is_complex():
        tensors = [x if x is None else torch.view_as_real(x) for x in tensors]
        inner *= 2
    if multipliers is not None:
        multipliers = multipliers.reshape(-1).contiguous()
    copies = [(original, copy) for original, copy in copies if original is not grad]
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master = tensors
    update = Update(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, step, multipliers, length, inner, first_index, seed, options, Seen()
    )
    return update, copies


def launch(
    backend: str, updates: Sequence[Update], grad_scale: Tensor | None, found_inf: Tensor | None, table: Table | None = None
) -> None:
    """Carry out `updates`, all on one device, by `backend`: "cuda", "triton", "cpu" or "torch". table: of these updates, where there is one
    already."""
    if torch.compiler.is_compiling() and backend != "torch":
        _through_the_compiler(backend, updates, grad_scale, found_inf)
    elif backend == "torch":
        _torch(updates, grad_scale, found_inf)
    else:
        _run(backend, Table(updates) if table is None else table, grad_scale, found_inf)


def _run(backend: str, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    updates = table.updates
    dispatch.implementation("adamw", backend).adamw(table, grad_scale, found_inf)
    # Autograd and the check for edits see writes by this counter alone.
    columns = list(zip(*updates, strict=True))
    optional = [x for column in columns[4:6] for x in column if x is not None]
    torch.autograd.graph.increment_version([*columns[0], *columns[2], *columns[3], *columns[6], *optional])


def _torch(updates: Sequence[Update], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    for update in updates:
        if update.step.device.type == "cpu":
            check_count(f"parameter {update.seed} of all groups", update.step.item())
    for update in updates:
        reference.adamw_update_(update, grad_scale)


def sum_of_squares(grads: Sequence[Tensor], backend: str = "torch") -> Tensor:
    """Of all elements of `grads`, which are real, dense and may be on several devices: fp64, 0-d, on the device of the first. "cpu" as
    `backend` sums those on the CPU natively."""
    devices: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.device not in devices:
            devices[grad.device] = []
        devices[grad.device].append(grad)
    sums = []
    for device, of_one in devices.items():
        native = backend == "cpu" == device.type and not torch.compiler.is_compiling()
        sums.append((dispatch.implementation("adamw", "cpu") if native else reference).sum_of_squares(of_one))
    total = sums[0]
    for other in sums[1:]:
        total = total + other.to(total.device)
    return total


def _through_the_compiler(backend: str, updates: list[Update], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """As lists of tensors and numbers, which an operator can take; what is absent is left out of its list and not marked present."""
    tensors: list[list[Tensor]] = [[x for x in column if x is not None] for column in zip(*[u[:8] for u in updates], strict=True)]
    present = [x is not None for u in updates for x in (u.max_exp_avg_sq, u.master, u.multipliers)]
    walks = [number for u in updates for number in u[8:12]]
    scalars: list[Tensor] = []
    numbers: list[float] = []
    for u in updates:
        o = u.options
        for x in o[:3]:
            numbers.append(-1.0 if isinstance(x, Tensor) else x)
            if isinstance(x, Tensor):
                scalars.append(x)
        numbers.extend((o.eps, o.weight_decay, float(o.maximize)))
    master_weights = updates[0].options.master_weights or ""
    torch.ops.adept_fast.adamw_(*tensors, scalars, grad_scale, found_inf, present, walks, numbers, master_weights, backend)


@torch.library.custom_op(
    "adept_fast::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps")
)
def _operator(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    scalars: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    present: Sequence[bool],
    walks: Sequence[int],
    numbers: Sequence[float],
    master_weights: str,
    backend: str,
) -> None:
    vmax, master, rates, scalar = iter(max_exp_avg_sqs), iter(masters), iter(multipliers), iter(scalars)
    updates = []
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        own = numbers[6 * i : 6 * i + 6]
        three = [next(scalar) if x < 0 else x for x in own[:3]]
        options = AdamWOptions(*three, own[3], own[4], bool(own[5]), master_weights or None)
        has_vmax, has_master, has_rates = present[3 * i : 3 * i + 3]
        optional = (next(column) if there else None for column, there in ((vmax, has_vmax), (master, has_master), (rates, has_rates)))
        maximum, kept, unit = optional
        updates.append(Update(param, grad, exp_avg, exp_avg_sq, maximum, kept, step, unit, *walks[4 * i : 4 * i + 4], options))
    for update in updates:  # a traced step knows dtypes and shapes, not memory
        check_row(f"parameter {update.seed} of all groups", update, update.options.master_weights, backend)
    _run(backend, Table(updates), grad_scale, found_inf)
