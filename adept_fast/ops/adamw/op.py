"""Runs updates by a backend, in eager mode and under torch.compile.

A backend is a module with a function `adamw(table, grad_scale, found_inf)`, all arguments on one device. It increments every `step`,
multiplies gradients by `grad_scale` (fp64, 0-d) and updates. If `found_inf` (fp32, 0-d) is not 0 it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adept_fast.ops import dispatch
from adept_fast.ops.adamw import reference
from adept_fast.ops.adamw.checks import check_count, check_operands
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import Table


def launch(backend: str, updates: Sequence[Update] | Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Run `updates`, all on one device, by a backend."""
    if backend == "torch":
        _torch(updates.updates if isinstance(updates, Table) else updates, grad_scale, found_inf)
    elif isinstance(updates, Table):
        _run(backend, updates, grad_scale, found_inf)
    elif torch.compiler.is_compiling():
        _through_the_compiler(backend, updates, grad_scale, found_inf)
    else:
        _run(backend, Table(updates), grad_scale, found_inf)


def _run(backend: str, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    dispatch.implementation("adamw", backend).adamw(table, grad_scale, found_inf)
    # Tells autograd, and the detection of in-place edits, that native code wrote.
    each = table.columns
    optional = [x for column in (each.max_exp_avg_sq, each.master, each.exp_avg_scale, each.exp_avg_sq_scale) for x in _present(column)]
    torch.autograd.graph.increment_version([*each.param, *each.exp_avg, *each.exp_avg_sq, *each.step, *optional])


def _torch(updates: Sequence[Update], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    for update in updates:
        if update.step.device.type == "cpu":
            check_count(f"parameter {update.seed} of all groups", update.step.item())
    for update in updates:
        reference.adamw_update_(update, grad_scale)


def sum_of_squares(grads: Sequence[Tensor], backend: str = "torch") -> Tensor:
    """Sum the squares of all elements: fp64, 0-d, on the device of the first gradient.

    grads: real and dense, on any devices.
    backend: "cpu" uses native code for those on the CPU.
    """
    devices: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.device not in devices:
            devices[grad.device] = []
        devices[grad.device].append(grad)
    sums: list[Tensor] = []
    for device, of_one in devices.items():
        native = backend == "cpu" == device.type and not torch.compiler.is_compiling()
        sums.append((dispatch.implementation("adamw", "cpu") if native else reference).sum_of_squares(of_one))
    total = sums[0]
    for other in sums[1:]:
        total = total + other.to(total.device)
    return total


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _number(x: float | Tensor) -> float:
    """Return -1 for a tensor, as no hyperparameter is negative."""
    return -1.0 if isinstance(x, Tensor) else x


def _through_the_compiler(backend: str, updates: Sequence[Update], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Call the custom operator. It takes flat lists: optional tensors that are None are left out, and flagged by a list of bools."""
    options = [u.options for u in updates]
    torch.ops.adept_fast.adamw_(
        params=[u.param for u in updates],
        grads=[u.grad for u in updates],
        exp_avgs=[u.exp_avg for u in updates],
        exp_avg_sqs=[u.exp_avg_sq for u in updates],
        max_exp_avg_sqs=_present([u.max_exp_avg_sq for u in updates]),
        masters=_present([u.master for u in updates]),
        scales=[x for u in updates for x in _present([u.exp_avg_scale, u.exp_avg_sq_scale])],
        steps=[u.step for u in updates],
        multipliers=_present([u.multipliers for u in updates]),
        has_max_exp_avg_sq=[u.max_exp_avg_sq is not None for u in updates],
        has_master=[u.master is not None for u in updates],
        has_multipliers=[u.multipliers is not None for u in updates],
        lengths=[u.length for u in updates],
        inners=[u.inner for u in updates],
        first_indices=[u.first_index for u in updates],
        seeds=[u.seed for u in updates],
        rows=[u.row for u in updates],
        tensor_options=[x for o in options for x in (o.lr, o.beta1, o.beta2) if isinstance(x, Tensor)],
        lrs=[_number(o.lr) for o in options],
        beta1s=[_number(o.beta1) for o in options],
        beta2s=[_number(o.beta2) for o in options],
        epsilons=[o.eps for o in options],
        weight_decays=[o.weight_decay for o in options],
        maximize=[o.maximize for o in options],
        master_weights=options[0].master_weights or "",
        grad_scale=grad_scale,
        found_inf=found_inf,
        backend=backend,
    )


@torch.library.custom_op(
    "adept_fast::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "scales", "steps")
)
def _operator(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    multipliers: Sequence[Tensor],
    has_max_exp_avg_sq: Sequence[bool],
    has_master: Sequence[bool],
    has_multipliers: Sequence[bool],
    lengths: Sequence[int],
    inners: Sequence[int],
    first_indices: Sequence[int],
    seeds: Sequence[int],
    rows: Sequence[int],
    tensor_options: Sequence[Tensor],
    lrs: Sequence[float],
    beta1s: Sequence[float],
    beta2s: Sequence[float],
    epsilons: Sequence[float],
    weight_decays: Sequence[float],
    maximize: Sequence[bool],
    master_weights: str,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str,
) -> None:
    maxima, kept, rates, scalars = iter(max_exp_avg_sqs), iter(masters), iter(multipliers), iter(tensor_options)
    scale = iter(scales)
    updates = []
    for i, param in enumerate(params):
        lr, beta1, beta2 = (next(scalars) if x < 0 else x for x in (lrs[i], beta1s[i], beta2s[i]))
        update = Update(
            param=param,
            grad=grads[i],
            exp_avg=exp_avgs[i],
            exp_avg_sq=exp_avg_sqs[i],
            max_exp_avg_sq=next(maxima) if has_max_exp_avg_sq[i] else None,
            master=next(kept) if has_master[i] else None,
            step=steps[i],
            multipliers=next(rates) if has_multipliers[i] else None,
            length=lengths[i],
            inner=inners[i],
            first_index=first_indices[i],
            seed=seeds[i],
            options=AdamWOptions(lr, beta1, beta2, epsilons[i], weight_decays[i], maximize[i], master_weights or None),
            exp_avg_scale=next(scale) if rows[i] else None,
            exp_avg_sq_scale=next(scale) if rows[i] else None,
            row=rows[i],
        )
        # Tracing saw dtypes and shapes, not memory.
        check_operands(f"parameter {update.seed} of all groups", update, update.options.master_weights, backend)
        updates.append(update)
    # The memory of a compiled step may belong to a graph, which reuses it.
    _run(backend, Table(updates, recurs=False), grad_scale, found_inf)
