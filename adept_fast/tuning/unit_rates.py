"""From unit importances to learning-rate multipliers.

    normalised   I_norm in [0, 1] per unit                                    averaged over refreshes, where asked for
    spread out   2 (1 - I_norm)                                               then scaled as the map has it

    rank             I_norm = (r + 1/2) / n, r the rank of the unit's importance among the n units of its kind; scaled so that the
                     parameter-weighted mean within the kind is 1 (default: it tells units of all kinds apart)
    mean_preserving  I_norm min-max normalised over all units; scaled so that the parameter-weighted mean is 1
    paper            the same, not scaled, as ADEPT (arXiv 2510.10071) has it: the most important unit gets 0
    a callable       gives 2 (1 - I_norm) itself

    conflict         times 1 - max(0, -cos), cos between Adam's momentum and the probe's gradient over the unit: an update along the
                     momentum raises the probe's loss, to first order, where they oppose
    floor            at least so much, after all else

Under every map the gain that keeps a post-norm copy silent gets 1 at least: it is the copy's gate, and all else learns through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.models.unwrap import bare
from adept_fast.optim import AdamW
from adept_fast.scoring.unit_importance import UnitImportance
from adept_fast.scoring.units import Units
from adept_fast.settings.validation import check, require_made
from adept_fast.tuning.param_group_rates import set_group_rates
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from torch.optim import Optimizer

RateMap = Callable[[Tensor, Units], Tensor]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def _by_kind(units: Units) -> list[Tensor]:
    """Indices of the units of each kind."""
    kinds = [unit.kind for unit in units]
    return [torch.tensor([index for index, other in enumerate(kinds) if other == kind]) for kind in dict.fromkeys(kinds)]


def _rank(importance: Tensor, units: Units) -> Tensor:
    rates = torch.empty_like(importance)
    for among in _by_kind(units):
        rates[among] = 2 * (1 - (_ranks(importance[among]) + 0.5) / len(among))
    return rates


def _min_max(importance: Tensor, units: Units) -> Tensor:
    low, high = importance.min(), importance.max()
    return 2 * (1 - (importance - low) / (high - low)) if high > low else torch.ones_like(importance)


def _mean_one(rates: Tensor, sizes: Tensor) -> Tensor:
    return rates * sizes.sum() / (rates * sizes).sum()


def _mean_one_by_kind(rates: Tensor, units: Units) -> Tensor:
    scaled, sizes = torch.empty_like(rates), units.sizes.double()
    for among in _by_kind(units):
        scaled[among] = _mean_one(rates[among], sizes[among])
    return scaled


def _mean_one_over_all(rates: Tensor, units: Units) -> Tensor:
    return _mean_one(rates, units.sizes.double())


def _as_they_are(rates: Tensor, units: Units) -> Tensor:
    return rates


MAPS: dict[str, tuple[RateMap, RateMap]] = {  # 2 (1 - I_norm) of importances, its scaling
    "rank": (_rank, _mean_one_by_kind),
    "mean_preserving": (_min_max, _mean_one_over_all),
    "paper": (_min_max, _as_they_are),
}


@dataclass(frozen=True)
class RateRule:
    """How importances become rates. floor: the lowest multiplier. average: the share of the earlier value in the moving average of
    normalised importances, 0 for none. conflict: whether units whose momentum opposes the probe's gradient are slowed.

    Raises InputError for an unknown map and for numbers out of range.
    """

    map: str | RateMap = Tuning.rate_map
    floor: float = Tuning.rate_floor
    average: float = Tuning.rate_average
    conflict: bool = Tuning.rate_conflict

    def __post_init__(self) -> None:
        named = {} if callable(self.map) else {"map": self.map}
        check(Tuning, "rate_", **named, floor=self.floor, average=self.average, conflict=self.conflict)

    def spread_out(self, importance: UnitImportance, before: Tensor | None = None) -> Tensor:
        """2 (1 - I_norm), averaged with `before`, the result of the last refresh: fp64 [units].

        Raises InputError for importances that are not finite, or a callable's result of another shape or with values that are negative
        or not finite.
        """
        require_made("importance", importance, UnitImportance, "score_units(model, probe, units)")
        values = importance.abs_taylor
        if not bool(torch.isfinite(values).all()):
            worst = next(unit.name for unit, value in zip(importance.units, values, strict=True) if not torch.isfinite(value))
            raise InputError(f"the importance of {worst} is not finite: the model's loss on the probe is not")
        spread = MAPS[self.map][0] if isinstance(self.map, str) else self.map
        rates = torch.as_tensor(spread(values, importance.units), dtype=torch.float64)
        if rates.shape != values.shape or not bool((torch.isfinite(rates) & (rates >= 0)).all()):
            raise InputError(f"a rate map must return {len(values)} finite values >= 0, found shape {tuple(rates.shape)}")
        return rates if before is None else self.average * before + (1 - self.average) * rates

    def rates(self, spread_out: Tensor, importance: UnitImportance) -> Tensor:
        """Multipliers of the base learning rate, one per unit, fp64 [units], finite and >= 0."""
        scale = MAPS[self.map][1] if isinstance(self.map, str) else _as_they_are
        rates = scale(spread_out, importance.units)
        if self.conflict and importance.conflict is not None:
            rates = rates * (1 - importance.conflict)
        gates = torch.tensor([unit.gate for unit in importance.units])
        return torch.where(gates, rates.clamp(min=1), rates.clamp(min=self.floor))


def unit_rates(importance: UnitImportance, map: str | RateMap = Tuning.rate_map, floor: float = Tuning.rate_floor) -> Tensor:
    """Multipliers of the base learning rate, one per unit, fp64 [units], finite and >= 0.

    map: a name, or a callable (abs_taylor fp64 [units], units) -> [units]. Raises InputError as RateRule does.
    """
    rule = RateRule(map, floor)
    return rule.rates(rule.spread_out(importance), importance)


def apply_rates(optimizer: Optimizer, model: nn.Module, units: Units, rates: Tensor) -> None:
    """Give the optimizer a multiplier of its learning rate for each unit: rates [units]. optimizer: adept_fast.AdamW, or any other one made
    from `rate_groups`. Raises InputError for one that is neither, and for units of another model or rates that are not one a unit, finite
    and >= 0."""
    require_made("units", units, Units, "Units.of(model)")
    require_made("rates", rates, Iterable, "unit_rates(importance)")
    model, rates = bare(model), torch.as_tensor(rates)
    if rates.shape != (len(units),) or not bool((rates.isfinite() & (rates >= 0)).all()):
        raise InputError(f"rates must be {len(units)} finite values >= 0, one a unit, found shape {tuple(rates.shape)}")
    if not isinstance(optimizer, AdamW):
        set_group_rates(optimizer, units, rates)  # of an engine, perhaps, that has flattened the parameters
        return
    units.require_fitting(model)
    for name, multipliers in units.spread(rates).items():
        optimizer.set_unit_lr(model.get_parameter(name), multipliers, dim=units.slices[name].dim if multipliers.ndim else 0)
