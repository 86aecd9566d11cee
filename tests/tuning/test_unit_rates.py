"""RateRule: floor, moving average and conflict, each by its formula, logged, and restored on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model
from adept_fast.scoring.unit_importance import score_units
from adept_fast.scoring.units import Units
from adept_fast.tuning.unit_rates import MAPS, RateRule, unit_rates
from tests.scoring.test_units import expanded, importance
from tests.support import tiny_models
from tests.tuning.test_adept_trainer import same, train, weights


@pytest.mark.parametrize("name", MAPS)
def test_a_floor_lifts_what_lies_below_it_and_nothing_else(name: str) -> None:
    units = Units.of(expanded())
    given = importance([float(index**2) for index in range(18)], units)
    free, floored = unit_rates(given, name), unit_rates(given, name, floor=0.7)
    assert float(free.min()) < 0.7 < float(free.max())
    assert torch.equal(floored, free.clamp(min=0.7))


def test_a_gate_keeps_its_own_floor() -> None:
    units = Units.of(expand_model(tiny_models.model("gemma2", head_dim=8), [1, 3]))
    gates = torch.tensor([unit.gate for unit in units])
    given = importance([float(index) for index in range(len(units))], units)
    rates = unit_rates(given, lambda values, units: torch.linspace(0, 0.5, len(units), dtype=torch.float64), floor=0.2)
    assert rates[gates].tolist() == [1.0] * int(gates.sum()) and float(rates[~gates].min()) == 0.2


@pytest.mark.parametrize("name", MAPS)
def test_the_moving_average_acts_on_normalised_values(name: str) -> None:
    """Scaling all importances of a refresh changes nothing; the scaled mean is 1 after averaging too."""
    units = Units.of(expanded())
    rule, random = RateRule(name, average=0.75), torch.Generator().manual_seed(1)
    first, second = (importance(torch.rand(18, generator=random).tolist(), units) for _ in range(2))
    before = rule.raw_rates(first)
    averaged = rule.raw_rates(second, before)
    torch.testing.assert_close(averaged, 0.75 * before + 0.25 * RateRule(name).raw_rates(second))
    torch.testing.assert_close(averaged, rule.raw_rates(importance((100 * second.abs_taylor).tolist(), units), before))
    rates, sizes = rule.rates(averaged, second), units.sizes.double()
    if name != "paper":
        assert float((rates * sizes).sum() / sizes.sum()) == pytest.approx(1)
    assert 0 <= float(averaged.min()) and float(averaged.max()) <= 2


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"floor": -0.1}, {"floor": 1.5}, {"average": 1.0}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))} must be"):
            RateRule(**wrong)


def test_conflict_is_the_cosine_of_momentum_and_probe_gradient_in_fp64() -> None:
    model, items = expanded("qwen2"), tiny_models.items(3)
    units = Units.of(model, "neuron")
    random = torch.Generator().manual_seed(3)
    momenta = {name: torch.randn(model.get_parameter(name).shape, generator=random) for name in units.slices}
    found = score_units(model, items, units, momenta=momenta)
    twin = expanded("qwen2").double()
    loss = sum(
        torch.nn.functional.cross_entropy(
            twin(torch.tensor([item.input_ids])).logits[0, :-1], torch.tensor(item.labels[1:]), reduction="sum"
        )
        for item in items
    )
    gradients = dict(zip(momenta, torch.autograd.grad(loss, [twin.get_parameter(name) for name in momenta]), strict=True))

    def products(one: dict, other: dict) -> torch.Tensor:
        elementwise = {name: (one[name].double() * other[name].double()).movedim(cut.dim, 0) for name, cut in units.slices.items()}
        return units.gather({name: value.flatten(1).sum(1) if value.ndim > 1 else value for name, value in elementwise.items()})

    cosine = products(momenta, gradients) / (products(momenta, momenta) * products(gradients, gradients)).sqrt()
    torch.testing.assert_close(found.conflict, (-cosine).clamp(min=0), rtol=1e-3, atol=1e-5)
    still = score_units(model, items, units, momenta={name: torch.zeros_like(value) for name, value in momenta.items()})
    assert torch.equal(still.conflict, torch.zeros(len(units), dtype=torch.float64)), "no momentum opposes nothing"
    rates, slowed = (RateRule(conflict=conflict).rates(RateRule().raw_rates(found), found) for conflict in (False, True))
    opposing = found.conflict > 0
    assert 0.3 < float(opposing.double().mean()) < 0.7
    assert torch.equal(slowed[~opposing], rates[~opposing]) and bool((slowed[opposing] < rates[opposing]).all())


@pytest.mark.parametrize("stop", [3, 5])
def test_average_and_conflict_go_on_where_they_were(tmp_path: Path, stop: int) -> None:
    rule = {"rate_map": RateRule("paper", floor=0.05, average=0.6, conflict=True), "units": "head"}
    whole, _, entries = train(tmp_path / "whole", rule)
    train(tmp_path / "cut", rule, stop=stop)
    resumed, _, again = train(tmp_path / "cut", rule, resume=str(tmp_path / "cut" / "work" / f"checkpoint-{stop - 1}"))
    timeless = [
        [{key: entry[key] for key in entry if key not in ("tokens_per_second", "peak_memory")} for entry in log] for log in (entries, again)
    ]
    assert same(weights(whole), weights(resumed)) and timeless[0] == timeless[1]
    refreshes = [entry for entry in entries if entry["event"] == "refresh"]
    assert ["conflict" in entry for entry in refreshes] == [False, True, True]
    plain, _, _ = train(tmp_path / "plain", {**rule, "rate_map": RateRule("paper", floor=0.05, conflict=True)})
    assert not same(weights(whole), weights(plain)), "the average has no effect"
