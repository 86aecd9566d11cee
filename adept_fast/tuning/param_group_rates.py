"""Whole-tensor rates through parameter groups: for engines that flatten parameters (ZeRO, FSDP1), where no row can have a rate of its
own, and for optimizers other than adept_fast.AdamW.

    learning rate of a group in a step = its lr, as a scheduler left it, * its rate

so weight decay is scaled too, as by AdamW's unit rates. Any torch optimizer takes the groups, and no scheduler sees the rates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.scoring.units import Units

if TYPE_CHECKING:
    from torch.optim import Optimizer

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")  # what engines put into names
_MULTIPLYING: WeakSet[Optimizer] = WeakSet()


def rate_groups(model: nn.Module, units: Units) -> list[dict[str, Any]]:
    """Groups of the copies' parameters, one a unit: "params", their "names", "unit" (its name) and "rate", which `apply_rates` sets, at
    the start and at each refresh.

    model: plain, or wrapped with its parameters kept (FSDP1 with use_orig_params=True). Raises InputError where units are smaller than a
    tensor, and where an engine has merged parameters already.

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
    """Give each group of an optimizer made from `rate_groups` its unit's multiplier: rates [units]. Raises InputError for other groups."""
    given = {unit.name: float(rate) for unit, rate in zip(units, rates.float(), strict=True)}
    groups = [group for group in optimizer.param_groups if "rate" in group]
    if sorted(group["unit"] for group in groups) != sorted(given):
        raise InputError(
            f"{type(optimizer).__name__}'s groups are not one for each unit: make it from adept_fast.tuning.rate_groups(model, units)"
        )
    for group in groups:
        group["rate"] = given[group["unit"]]
    multiply_rates(optimizer)


def multiply_rates(optimizer: Optimizer) -> None:
    """From now on the optimizer's steps multiply learning rates by the groups' rates: after loading a state, whose rates go on."""
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


def refusal(engine: str) -> InputError:
    return InputError(
        f"{engine} flattens parameters: unit-wise rates, and checkpoints of what is trained, need DDP or FSDP2 (fsdp_version: 2); "
        "whole-tensor rates work through adept_fast.tuning.rate_groups in a loop of your own"
    )


def refuse_flattened(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Raise InputError where an engine flattens parameters, so that unit-wise rates cannot reach their rows."""
    engine = _flattens(model.modules(), model.parameters(), optimizer)
    if engine:
        raise refusal(engine)


def _flattens(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter], optimizer: Optimizer | None) -> str | None:
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")  # nobody has such a module without it
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        return "FSDP1"
    inner = getattr(optimizer, "optimizer", optimizer)
    if any(hasattr(parameter, "ds_id") for parameter in parameters) or type(inner).__module__.partition(".")[0] == "deepspeed":
        return "DeepSpeed ZeRO"
    return None


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
