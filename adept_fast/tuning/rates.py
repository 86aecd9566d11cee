"""From unit importances to learning-rate multipliers.

rank             2 (1 - (r + 1/2) / n), r the rank of the unit's importance among the n units of its kind, scaled so that the
                 parameter-weighted mean within the kind is 1 (default: it tells units of all kinds apart)
mean_preserving  2 (1 - I_norm), I_norm min-max normalised over all units, scaled so that the parameter-weighted mean is 1
paper            2 (1 - I_norm), as ADEPT (arXiv 2510.10071) has it: the most important unit gets 0

Under every map the gain that keeps a post-norm copy silent gets 1 at least: it is the copy's gate, and all else learns through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.saliency import UnitImportance
from adept_fast.units import Units

if TYPE_CHECKING:
    from adept_fast.optim import AdamW

RateMap = Callable[[Tensor, Units], Tensor]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def _rank(importance: Tensor, units: Units) -> Tensor:
    rates = torch.empty(len(units), dtype=torch.float64)
    kinds = [unit.kind for unit in units]
    for kind in dict.fromkeys(kinds):
        among = torch.tensor([index for index, other in enumerate(kinds) if other == kind])
        raw = 2 * (1 - (_ranks(importance[among]) + 0.5) / len(among))
        sizes = units.sizes[among].double()
        rates[among] = raw * sizes.sum() / (raw * sizes).sum()
    return rates


def _paper(importance: Tensor, units: Units) -> Tensor:
    low, high = importance.min(), importance.max()
    return 2 * (1 - (importance - low) / (high - low)) if high > low else torch.ones_like(importance)


def _mean_preserving(importance: Tensor, units: Units) -> Tensor:
    raw, sizes = _paper(importance, units), units.sizes.double()
    return raw * sizes.sum() / (raw * sizes).sum()


MAPS: dict[str, RateMap] = {"rank": _rank, "mean_preserving": _mean_preserving, "paper": _paper}


def unit_rates(importance: UnitImportance, map: str | RateMap = "rank") -> Tensor:
    """Multipliers of the base learning rate, one per unit, fp64 [units], finite and >= 0.

    map: a name, or a callable (abs_taylor fp64 [units], units) -> [units]. Raises InputError for an unknown name, importances that are
    not finite, or a callable's result of another shape or with values that are negative or not finite.
    """
    if isinstance(map, str):
        if map not in MAPS:
            raise InputError(f"tune.rate_map must be one of {', '.join(MAPS)}, found {map!r}")
        map = MAPS[map]
    values = importance.abs_taylor
    if not bool(torch.isfinite(values).all()):
        worst = next(unit.name for unit, value in zip(importance.units, values, strict=True) if not torch.isfinite(value))
        raise InputError(f"the importance of {worst} is not finite: the model's loss on the probe is not")
    rates = torch.as_tensor(map(values, importance.units), dtype=torch.float64)
    if rates.shape != values.shape or not bool((torch.isfinite(rates) & (rates >= 0)).all()):
        raise InputError(f"a rate map must return {len(values)} finite values >= 0, found shape {tuple(rates.shape)}")
    gates = torch.tensor([unit.gate for unit in importance.units])
    return torch.where(gates, rates.clamp(min=1), rates)


def apply_rates(optimizer: AdamW, model: nn.Module, units: Units, rates: Tensor) -> None:
    """Give the optimizer a multiplier of its learning rate for each unit: rates [units]."""
    for name, multipliers in units.spread(rates).items():
        optimizer.set_unit_lr(model.get_parameter(name), multipliers, dim=units.slices[name].dim if multipliers.ndim else 0)
