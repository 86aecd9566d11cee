"""Turn unit importances into learning-rate multipliers.

    raw rate = 2 (1 - I_norm), I_norm in [0, 1] per unit        averaged over refreshes where asked for, then scaled by the map

    rank             I_norm = (r + 1/2) / n, r the rank of the unit's importance among the n units of its kind; scaled so that the
                     parameter-weighted mean within the kind is 1 (default: it separates units of every kind)
    mean_preserving  I_norm is min-max normalised over all units; scaled so that the parameter-weighted mean is 1
    paper            the same without scaling, as in ADEPT (arXiv 2510.10071): the most important unit gets 0
    a callable       returns 2 (1 - I_norm) itself

    conflict         multiplies by 1 - max(0, -cos), cos between Adam's momentum and the probe's gradient over the unit: where they oppose,
                     an update along the momentum raises the probe's loss, to first order
    floor            the lowest multiplier, applied last

Under every map the gain that keeps a post-norm copy silent gets at least 1: it is the copy's gate, and all else learns through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Return ranks from 0; ties share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def _by_kind(units: Units) -> list[Tensor]:
    """Return the indices of the units of each kind."""
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


MAPS: dict[str, tuple[RateMap, RateMap]] = {  # name -> raw rates of importances, scaling of raw rates
    "rank": (_rank, _mean_one_by_kind),
    "mean_preserving": (_min_max, lambda rates, units: _mean_one(rates, units.sizes.double())),
    "paper": (_min_max, lambda rates, units: rates),
}


@dataclass(frozen=True)
class RateRule:
    """How importances become rates.

    map: a name, or a callable (importances fp64 [units], Units) -> raw rates [units]. floor: the lowest multiplier. average: the weight of
    earlier refreshes in the moving average of raw rates, 0 for none. conflict: slow units whose momentum opposes the probe's gradient.
    Raises InputError for an unknown map and for numbers out of range.
    """

    map: str | RateMap = Tuning.rate_map
    floor: float = Tuning.rate_floor
    average: float = Tuning.rate_average
    conflict: bool = Tuning.rate_conflict

    def __post_init__(self) -> None:
        named: dict[str, Any] = {} if callable(self.map) else {"map": self.map}
        check(Tuning, "rate_", **named, floor=self.floor, average=self.average, conflict=self.conflict)

    def raw_rates(self, importance: UnitImportance, before: Tensor | None = None) -> Tensor:
        """Return 2 (1 - I_norm), averaged with `before`, the result of the last refresh: fp64 [units].

        Raises InputError for importances that are not finite, and for a callable's result of another shape, negative or not finite.
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

    def rates(self, raw_rates: Tensor, importance: UnitImportance) -> Tensor:
        """Return multipliers of the learning rate, fp64 [units], finite and >= 0."""
        rates = MAPS[self.map][1](raw_rates, importance.units) if isinstance(self.map, str) else raw_rates
        if self.conflict and importance.conflict is not None:
            rates = rates * (1 - importance.conflict)
        gates = torch.tensor([unit.gate for unit in importance.units])
        return torch.where(gates, rates.clamp(min=1), rates.clamp(min=self.floor))


def unit_rates(importance: UnitImportance, map: str | RateMap = Tuning.rate_map, floor: float = Tuning.rate_floor) -> Tensor:
    """Return a multiplier of the learning rate for each unit: low for units that general competence rests on.

    Args:
        importance: of the units, from `score_units`.
        map: "rank", "mean_preserving", "paper", or a callable (importances fp64 [units], Units) -> [units].
        floor: the lowest multiplier, from 0 to 1.

    Returns:
        fp64 [units], finite and >= 0.

    Raises:
        InputError: an unknown map, a number out of range, importances that are not finite, or a callable's wrong result.

    Source: ADEPT (arXiv 2510.10071), stage 2; the maps stand at the top of adept_fast/tuning/unit_rates.py.

    >>> expanded = expand_model(model, [1])
    >>> importance = score_units(expanded, probe, Units.of(expanded))
    >>> unit_rates(importance, map="rank").shape
    torch.Size([9])
    """
    rule = RateRule(map, floor)
    return rule.rates(rule.raw_rates(importance), importance)


def apply_rates(optimizer: Optimizer, model: nn.Module, units: Units, rates: Tensor) -> None:
    """Set a multiplier of the optimizer's learning rate for each unit.

    Args:
        optimizer: adept_fast.AdamW, or any torch optimizer over `rate_groups`.
        model: the model of the optimizer's parameters; it may be wrapped.
        units: the units of that model.
        rates: [units], finite and >= 0, from `unit_rates`.

    Raises:
        InputError: another optimizer, units of another model, or wrong rates.

    >>> expanded = expand_model(model, [1])
    >>> units = Units.of(expanded)
    >>> optimizer = AdamW(expanded.named_parameters(), lr=1e-4)
    >>> apply_rates(optimizer, expanded, units, torch.full([len(units)], 0.5))
    """
    require_made("units", units, Units, "Units.of(model)")
    require_made("rates", rates, Iterable, "unit_rates(importance)")
    if not hasattr(optimizer, "param_groups"):  # engines wrap theirs in classes of their own
        raise InputError(f"optimizer must be an optimizer, found {type(optimizer).__name__}: give adept_fast.AdamW")
    try:
        model, rates = bare(model), torch.as_tensor(rates)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"rates must be {len(units)} finite values >= 0, one a unit ({error}): unit_rates(importance)") from None
    if rates.shape != (len(units),) or not bool((rates.isfinite() & (rates >= 0)).all()):
        raise InputError(f"rates must be {len(units)} finite values >= 0, one a unit, found shape {tuple(rates.shape)}")
    if not isinstance(optimizer, AdamW):
        set_group_rates(optimizer, units, rates)  # before require_fitting: an engine may have flattened the parameters
        return
    units.require_fitting(model)
    for name, multipliers in units.spread(rates).items():
        optimizer.set_unit_lr(model.get_parameter(name), multipliers, dim=units.slices[name].dim if multipliers.ndim else 0)


def summary(units: Units, rates: Tensor) -> dict[str, float]:
    """Return the least, mean and largest rate, and the mean of each kind of unit, under the names that trackers show."""
    kinds: dict[str, list[float]] = {}
    for unit, rate in zip(units, rates.tolist(), strict=True):
        kinds.setdefault(unit.kind, []).append(rate)
    means = {f"rate/{kind}": sum(values) / len(values) for kind, values in kinds.items()}
    return {"rate/min": float(rates.min()), "rate/mean": float(rates.mean()), "rate/max": float(rates.max()), **means}
