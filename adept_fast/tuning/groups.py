"""Whole-tensor rates as parameter groups, for engines that flatten parameters (ZeRO, FSDP1), where no row can have a rate of its own.

A group's learning rate is base * multiplier, so weight decay is scaled too, as by AdamW's unit rates; any optimizer takes the groups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.units import Units

if TYPE_CHECKING:
    from torch.optim import Optimizer

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")  # what engines put into names


def rate_groups(model: nn.Module, units: Units, rates: Tensor, learning_rate: float) -> list[dict[str, Any]]:
    """Groups of the copies' parameters, one for each distinct multiplier: "params", "lr", and the parameters' "names".

    model: plain, or wrapped with its parameters kept (FSDP1 with use_orig_params=True). rates: multipliers [units], as unit_rates gives.
    Raises InputError where units are smaller than a tensor, and where an engine has merged parameters already.
    """
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters()}
    multipliers = units.spread(rates)
    for name, cut in units.slices.items():
        if len(cut.unit.unique()) > 1:
            raise InputError(f"{name}: cut into several units; parameter groups have one rate a tensor: cut by tensor, or use DDP or FSDP2")
        if name not in parameters:
            raise InputError(
                f"{name}: not among the model's parameters: an engine has merged them; make the groups before it does, or keep "
                "them (FSDP1: use_orig_params=True)"
            )
    groups: dict[float, dict[str, Any]] = {}
    for name, multiplier in multipliers.items():
        rate = float(multiplier)
        group = groups.setdefault(rate, {"params": [], "names": [], "lr": learning_rate * rate})
        group["params"].append(parameters[name])
        group["names"].append(name)
    return list(groups.values())


def flattened(engine: str) -> InputError:
    return InputError(
        f"{engine} flattens parameters: unit-wise rates need DDP or FSDP2 (fsdp_version: 2); whole-tensor rates work through "
        "adept_fast.tuning.rate_groups and an optimizer of your own"
    )


def refuse_flattened(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Raise InputError where an engine flattens parameters, so that unit-wise rates cannot reach their rows."""
    engine = _flattens(model.modules(), model.parameters(), optimizer)
    if engine:
        raise flattened(engine)


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
