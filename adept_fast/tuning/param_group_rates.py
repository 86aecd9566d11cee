"""Whole-tensor rates through parameter groups, for any torch optimizer and for engines that flatten parameters (ZeRO, FSDP1).

    learning rate of a group in a step = its scheduled lr * its rate

The rate scales weight decay too, as AdamW's unit rates do. Schedulers do not see the rates.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.scoring.units import Units

if TYPE_CHECKING:
    from torch.optim import Optimizer

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")  # engines insert them into names
_MULTIPLYING: WeakSet[Optimizer] = WeakSet()


def rate_groups(model: nn.Module, units: Units) -> list[dict[str, Any]]:
    """Return parameter groups of the copies, one a unit, whose rates `apply_rates` sets.

    A group has "params", their "names", "unit" (its name) and "rate". model: plain, or wrapped with its parameters kept (FSDP1 with
    use_orig_params=True). Raises InputError where units are smaller than a tensor, and where an engine has merged parameters already.

    >>> optimizer = torch.optim.AdamW(rate_groups(model, units), lr=2e-4)
    >>> apply_rates(optimizer, model, units, unit_rates(importance))
    """
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters()}
    groups: dict[int, dict[str, Any]] = {}
    for name, cut in units.slices.items():
        if len(cut.unit.unique()) > 1:
            raise InputError(f"{name}: cut into several units; parameter groups have one rate a tensor: cut by tensor, or use DDP or FSDP2")
        if name not in parameters:
            raise InputError(
                f"{name}: not among the model's parameters: an engine has merged them; make the groups before it does, or keep "
                "them (FSDP1: use_orig_params=True)"
            )
        index = int(cut.unit.flatten()[0])
        group = groups.setdefault(index, {"params": [], "names": [], "unit": units.units[index].name, "rate": 1.0})
        group["params"].append(parameters[name])
        group["names"].append(name)
    return list(groups.values())


def has_rate_groups(optimizer: Optimizer) -> bool:
    return any("rate" in group for group in optimizer.param_groups)


def set_group_rates(optimizer: Optimizer, units: Units, rates: Tensor) -> None:
    """Set the rate of each group made by `rate_groups`. rates: multipliers, [units]. Raises InputError for other groups."""
    given = {unit.name: float(rate) for unit, rate in zip(units, rates.float(), strict=True)}
    groups = [group for group in optimizer.param_groups if "rate" in group]
    if sorted(group["unit"] for group in groups) != sorted(given):
        raise InputError(
            f"{type(optimizer).__name__}'s groups are not one for each unit: "
            "make it from adept_fast.tuning.param_group_rates.rate_groups(model, units)"
        )
    for group in groups:
        group["rate"] = given[group["unit"]]
    multiply_rates(optimizer)


def multiply_rates(optimizer: Optimizer) -> None:
    """Make the optimizer's steps multiply learning rates by the groups' rates. Call it after loading a state that has rates."""
    if optimizer not in _MULTIPLYING:
        _MULTIPLYING.add(optimizer)
        optimizer.register_step_pre_hook(_multiply)
        optimizer.register_step_post_hook(_put_back)


def _multiply(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if "rate" in group:
            group["scheduled_lr"], group["lr"] = group["lr"], group["lr"] * group["rate"]


def _put_back(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if "rate" in group:
            group["lr"] = group.pop("scheduled_lr")


def flattening_error(engine: str) -> InputError:
    return InputError(
        f"{engine} flattens parameters: unit-wise rates, and checkpoints of what is trained, need DDP or FSDP2 (fsdp_version: 2); "
        "whole-tensor rates work through adept_fast.tuning.param_group_rates.rate_groups in a loop of your own"
    )


def refuse_flattened(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Raise InputError where an engine flattens parameters, because unit-wise rates cannot reach rows then."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")  # imported wherever FSDP1 is in use
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise flattening_error("FSDP1")
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) or type(inner).__module__.partition(".")[0] == "deepspeed":
        raise flattening_error("DeepSpeed ZeRO")


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
