"""The race: it keeps its promise over many orders, spends less, stops at once where it can, and takes only what was proven."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from adept_fast import expand_model
from adept_fast.errors import InputError
from adept_fast.runtime.bootstrap import bootstrap
from adept_fast.scoring import race
from adept_fast.scoring.race import Race
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.scores import LayerScores
from adept_fast.scoring.select_layers import select_layers, undecided
from adept_fast.scoring.stability import selection_stability
from tests.support import tiny_models

LAYERS, ITEMS = 10, 200


def corpus(gap: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Skewed loss differences [items, layers] of items of unequal length; the layers' importances lie `gap` nats apart."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (ITEMS,), generator=generator).double()
    noise = torch.empty(ITEMS, LAYERS, dtype=torch.float64).exponential_(generator=generator) - 1
    shared = torch.randn(ITEMS, 1, dtype=torch.float64, generator=generator)
    differences = tokens[:, None] * (0.3 * noise + 0.5 * shared)
    importances = gap * torch.arange(LAYERS, dtype=torch.float64)
    return differences + tokens[:, None] * (importances - differences.sum(0) / tokens.sum()), tokens


def replay(setting: Race, differences: torch.Tensor, tokens: torch.Tensor, seed: int) -> tuple[race.Outcome, int]:
    """A race on stored differences, and how many item and layer pairs it asked for; what it did not ask for it does not see."""
    asked = 0

    def measure(items: list[int], layers: list[int]) -> torch.Tensor:
        nonlocal asked
        asked += len(items) * len(layers)
        seen = torch.full((len(items), differences.shape[1]), torch.nan, dtype=torch.float64)
        seen[:, layers] = differences[items][:, layers]
        return seen

    return race.run(setting, tokens, differences.shape[1], measure, seed), asked


@pytest.mark.parametrize("gap", [0.02, 0.15])
def test_regret_stays_under_its_bound(gap: float) -> None:
    differences, tokens = corpus(gap)
    values = differences.sum(0) / tokens.sum()
    best = float(values.sort().values[:3].sum())
    broken, shares = 0, []
    for seed in range(60):
        outcome, asked = replay(Race(k=3, regret=0.1, confidence=0.9), differences, tokens, seed)
        regret = float(values[list(outcome.layers)].sum()) - best
        assert len(outcome.layers) == 3 and outcome.bound <= 0.1
        broken += regret > outcome.bound + 1e-9
        shares.append(asked / differences.numel())
    assert broken <= 6, "the bound fails more often than one time in ten"
    assert sum(shares) / len(shares) < (0.9 if gap == 0.02 else 0.5)


def test_boundary_covers_at_all_times_at_once() -> None:
    """Gaussian walks without replacement cross the 5 % boundary at any of 400 times in at most about 5 % of the orders."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, dtype=torch.float64, generator=generator)
    radius = torch.tensor([race.boundary(done, 400, 0.05) for done in range(1, 401)], dtype=torch.float64)
    crossed = 0
    for _ in range(1000):
        walk = values[torch.randperm(400, generator=generator)].cumsum(0) / torch.arange(1, 401)
        crossed += bool((values.mean() - walk > radius * values.std() + 1e-12).any())
    assert 5 <= crossed <= 50, "it does not cover, or it covers so much that it is of no use"
    assert float(radius[-1]) == 0 and bool((radius[:-1] > radius[1:]).all())
    assert float(radius[99]) < 2.5 * 1.645 * math.sqrt((1 / 100) * (300 / 400))


def test_only_what_is_proven_is_decided() -> None:
    """Two layers that nothing tells apart, one surely below them and one surely above: these two leave the race, the others do not."""
    differences, tokens = corpus(0.0)
    differences = differences[:, :4] + tokens[:, None] * torch.tensor([-5.0, 0.001, 0.0, 5.0])
    outcome, _ = replay(Race(k=2, regret=0.0), differences, tokens, 0)
    assert outcome.layers == (0, 2) and outcome.items == ITEMS and outcome.bound == 0
    assert outcome.measured[1:3] == (ITEMS, ITEMS) and max(outcome.measured[0], outcome.measured[3]) < ITEMS


def test_bounds_are_those_of_a_regression_on_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    differences, tokens = corpus(0.05)
    values, mean = differences[:60, :2] * (ITEMS / float(tokens.sum())), float(tokens.mean())
    means, upper = race.upper_bounds(values, tokens[:60], ITEMS, mean, 0.01)
    design = torch.stack([torch.ones(60, dtype=torch.float64), tokens[:60]], 1)
    fitted = torch.linalg.lstsq(design, values).solution
    torch.testing.assert_close(means, fitted[0] + mean * fitted[1])
    deviation = ((values - design @ fitted) @ torch.tensor([1.0, -1.0]).double()).square().sum().div(60 - 2).sqrt()
    torch.testing.assert_close(upper[0, 1], means[0] - means[1] + race.boundary(60, ITEMS, 0.01) * deviation)
    looks, bounds = [], race.upper_bounds
    monkeypatch.setattr(race, "upper_bounds", lambda *given: looks.append(given) or bounds(*given))
    replay(Race(confidence=0.9), differences, tokens, 0)
    torch.testing.assert_close(looks[0][0], differences[race.item_order(ITEMS, 0)[:32]] * (ITEMS / float(tokens.sum())))
    assert {round(look[-1] * LAYERS * (LAYERS - 1), 12) for look in looks} == {0.1}, "each ordered pair has its share of the error"


@pytest.mark.parametrize("alpha", [0.05, 1e-4])
@pytest.mark.parametrize("measured", [10, 100, 390])
def test_boundary_is_where_the_mixture_reaches_one_over_alpha(measured: int, alpha: float) -> None:
    """The half-normal mixture over Gaussian drifts, 2 sqrt(r / (v + r)) exp(s^2 / (2 (v + r))) Phi(s / sqrt(v + r)), a supermartingale."""
    variance, sum_ = measured / (400 * (400 - measured)), race.boundary(measured, 400, alpha) * measured / (400 - measured)
    mixed = 1 / (3 * 400) / (2 * math.log(1 / alpha) + math.log1p(2 * math.log(1 / alpha)))
    grown = variance + mixed
    normal = 0.5 * (1 + math.erf(sum_ / math.sqrt(2 * grown)))
    assert 0.99 <= alpha * 2 * math.sqrt(mixed / grown) * math.exp(sum_**2 / (2 * grown)) * normal <= 1 + 2 * alpha


def test_bound_on_regret_holds_for_every_exchange() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        upper = torch.randn(7, 7, dtype=torch.float64, generator=generator)
        chosen, others = (0, 2, 5), (1, 3, 4, 6)
        gains = upper.clamp_min(0)
        worst = max(sum(float(gains[i, j]) for i, j in zip(chosen, to, strict=True)) for to in itertools.permutations(others, 3))
        assert worst <= race.regret_bound(upper, chosen, others) + 1e-12
    assert race.regret_bound(upper, (), others) == 0
    one_partner = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    for gains, exchanges in ((one_partner, ((0, 1), (2,))), (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), ((0, 1), (2, 3)))):
        upper = torch.zeros(4, 4, dtype=torch.float64)
        upper[:2, 2 : 2 + gains.shape[1]] = gains
        assert race.regret_bound(upper, *exchanges) == 1, "a layer is exchanged once"


def test_regression_on_tokens_narrows_and_the_end_is_exact() -> None:
    differences, tokens = corpus(0.05)
    values = differences * (ITEMS / float(tokens.sum()))
    means, upper = race.upper_bounds(values, tokens, ITEMS, float(tokens.mean()), 0.01)
    torch.testing.assert_close(means, differences.sum(0) / tokens.sum(), atol=1e-12, rtol=0)
    torch.testing.assert_close(upper, means[:, None] - means, atol=1e-12, rtol=0)
    half, same = values[:100] + tokens[:100, None] * torch.arange(LAYERS), torch.full((100,), 7.0)
    with_tokens = race.upper_bounds(half, tokens[:100], ITEMS, float(tokens.mean()), 0.01)[1]
    without = race.upper_bounds(half, same, ITEMS, 7.0, 0.01)[1]
    width = with_tokens + with_tokens.T  # the estimates cancel
    assert float(width.sum()) < 0.5 * float((without + without.T).sum())


def test_an_item_counts_for_the_layers_that_were_measured_on_it() -> None:
    sums = torch.tensor([[1.0, 2.0], [3.0, torch.nan]], dtype=torch.float64)
    value, low, high = bootstrap(sums, torch.tensor([1.0, 3.0]))
    assert value.tolist() == [1.0, 2.0] and (low[1], high[1]) == (2.0, 2.0)


@pytest.mark.slow
def test_scores_of_a_race(tmp_path) -> None:
    model, items = tiny_models.model(num_hidden_layers=6), tiny_models.items(60)
    setting = Race(k=2, regret=0.3, first=8)
    exact = score_layers(model, items)
    journal = tmp_path / "journal"
    scores = score_layers(model, items, race=setting, seed=3, journal=journal)
    proof = scores.certificate
    chosen = select_layers(scores, 2)
    regret = sum(exact.values[layer] for layer in chosen) - sum(sorted(exact.values)[:2])
    assert chosen == proof["layers"] and regret <= proof["regret_bound"] <= 0.3
    assert proof["items_used"] == max(proof["measured_items"]) and 0 < proof["cost_share"] <= 1 and proof["tokens_used"] <= proof["tokens"]
    assert set(undecided(scores, chosen)) <= set(proof["undecided"])
    sums = scores.per_item["answer"].sums
    assert [int((~sums[:, layer].isnan()).sum()) for layer in range(6)] == proof["measured_items"]
    known = ~sums.isnan()
    torch.testing.assert_close(sums[known], exact.per_item["answer"].sums[known], atol=1e-4, rtol=0)
    scores.save(tmp_path / "scores.json")
    assert LayerScores.load(tmp_path / "scores.json") == scores
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    again = score_layers(model, items, race=setting, seed=3, journal=journal)
    assert again.profiles == scores.profiles and again.certificate == proof
    for k, placement in ((3, "lowest"), (2, "lowest_per_band")):
        with pytest.raises(InputError, match="race for the 2 lowest"):
            select_layers(scores, k, placement)
    assert select_layers(scores, 2, "uniform") == [2, 5]


def test_a_race_that_has_to_see_everything_is_exact() -> None:
    differences, tokens = corpus(1e-4)
    outcome, _ = replay(Race(k=3, regret=0.0), differences, tokens, 0)
    values = differences.sum(0) / tokens.sum()
    assert sorted(outcome.layers) == sorted(values.argsort()[:3].tolist()) and outcome.bound == 0 and outcome.items == ITEMS


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 6}, {"regret": -0.1}, {"confidence": 1.0}, {"first": 2}, {"growth": 1.0}])
def test_settings_that_cannot_be(change: dict) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(change))} must be"):
        dataclasses.replace(Race(k=2), **change).check(6)


@pytest.mark.slow
def test_copies_are_no_candidates_and_a_race_bounds_the_regret_among_the_others() -> None:
    model, items = expand_model(tiny_models.model(num_hidden_layers=6), [1, 3]), tiny_models.items(60)
    exact = score_layers(model, items)
    scores = score_layers(model, items, race=Race(k=2, regret=0.2, first=8))
    proof, chosen = scores.certificate, select_layers(scores, 2)
    assert scores.candidates == [0, 1, 3, 4, 6, 7] and chosen == proof["layers"] and not {2, 5} & {*chosen, *proof["undecided"]}
    regret = sum(exact.values[layer] for layer in chosen) - sum(sorted(exact.values[layer] for layer in scores.candidates)[:2])
    assert regret <= proof["regret_bound"] <= 0.2
    assert [proof["measured_items"][copy] for copy in (2, 5)] == [8, 8] and [scores.values[copy] for copy in (2, 5)] == [0, 0]
    assert not {2, 5} & {*undecided(scores, chosen), *undecided(exact, select_layers(exact, 2))}
    assert select_layers(exact, 2, "uniform") == [3, 7] and max(select_layers(exact, 6)) == 7
    stability = selection_stability(exact, chosen)["sizes"][-1]
    assert sum(stability["frequency"]) == pytest.approx(2) and stability["frequency"][2] == stability["frequency"][5] == 0
    with pytest.raises(InputError, match="from 1 to 6, the number"):
        select_layers(exact, 7)
    with pytest.raises(InputError, match="^k must be a whole number from 1 to 5"):
        score_layers(model, items, race=Race(k=6))


def test_a_race_measures_one_loss_by_masking() -> None:
    with pytest.raises(InputError, match="one loss"):
        score_layers(tiny_models.model(), tiny_models.items(9), losses=("kl",), race=Race(k=1))
