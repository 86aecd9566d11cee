"""Units cover every parameter of the copies once; importances and rates are the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.expansion.first_importance import first_importance
from adept_fast.scoring.unit_importance import UnitImportance, score_units, unit_importance
from adept_fast.scoring.units import Units
from adept_fast.tuning.unit_rates import unit_rates
from tests.support import tiny_models

GRANULARITIES = ("tensor", "head", "neuron")


def expanded(family: str = "llama", trained: bool = True) -> torch.nn.Module:
    model = expand_model(tiny_models.model(family), [1, 3])
    freeze_original(model)
    if trained:  # no longer silent
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_units_cover_the_copies_exactly(family: str, granularity: str) -> None:
    model = expanded(family)
    units = Units.of(model, granularity)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(units.slices) == set(trainable)
    assert int(units.sizes.sum()) == sum(parameter.numel() for parameter in trainable.values())
    assert len({unit.name for unit in units}) == len(units)
    for name, cut in units.slices.items():
        assert cut.unit.shape == (trainable[name].shape[cut.dim],)


@pytest.mark.slow
def test_names_and_numbers_of_units() -> None:
    llama = expanded()
    assert len(Units.of(llama)) == 2 * 9
    assert len(Units.of(llama, "head")) == 2 * (4 + 2 + 2 + 4 + 5)
    assert len(Units.of(llama, "neuron")) == 2 * (32 + 16 + 16 + 32 + 48 * 3 + 2)
    fused = Units.of(expanded("phi3"))
    assert [unit.kind for unit in fused][:4] == ["o_proj", "qkv_proj[q]", "qkv_proj[k]", "qkv_proj[v]"]
    assert {unit.name for unit in fused} >= {"model.layers.2.mlp.gate_up_proj[gate]", "model.layers.5.mlp.gate_up_proj[up]"}
    with pytest.raises(InputError, match="^granularity must be one of"):
        Units.of(llama, "layer")
    with pytest.raises(InputError, match="no adept_config"):
        Units.of(tiny_models.model())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_importance_is_the_formula_in_fp64(granularity: str) -> None:
    """mean |theta g|, g of the token-weighted corpus loss; mean over units of E over sequences of g^2."""
    model, items = expanded("phi3"), tiny_models.items(4)
    units = Units.of(model, granularity)
    found = score_units(model, items, units)
    twin = expanded("phi3").double()
    parameters = {name: twin.get_parameter(name) for name in units.slices}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for item in items:
        logits = twin(torch.tensor([item.input_ids])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(item.labels[1:]), reduction="sum")
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient
            squares[name] += gradient**2 / len(items)
    tokens = sum(item.supervised for item in items)
    for kind, per_parameter in (("abs_taylor", {n: (parameters[n] * total[n] / tokens).abs() for n in total}), ("fisher", squares)):
        expected = torch.zeros(len(units), dtype=torch.float64)
        for name, cut in units.slices.items():
            flat = (
                per_parameter[name].detach().movedim(cut.dim, 0).flatten(1).sum(1) if per_parameter[name].ndim > 1 else per_parameter[name]
            )
            expected.index_add_(0, cut.unit, flat.detach())
        torch.testing.assert_close(getattr(found, kind), expected / units.sizes, rtol=2e-4, atol=1e-12)


def test_importance_leaves_gradients_rng_and_modes_alone() -> None:
    model = expanded().train()
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    required = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    score_units(model, tiny_models.items(3), Units.of(model))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    after = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert after.keys() == gradients.keys() and all(torch.equal(after[name], gradients[name]) for name in gradients)


def test_gradient_checkpointing_changes_no_importance() -> None:
    model, items = expanded().train(), tiny_models.items(3)
    units = Units.of(model)
    expected = score_units(model, items, units)
    model.gradient_checkpointing_enable()
    assert torch.equal(score_units(model, items, units).abs_taylor, expected.abs_taylor) and model.training


def test_a_silent_copy_has_no_signal_and_its_source_gives_the_first_rates() -> None:
    model, items = expanded(trained=False), tiny_models.items(3)
    units = Units.of(model)
    assert not score_units(model, items, units).abs_taylor.any()
    first = unit_importance(units, first_importance(model, items))
    assert bool((first.abs_taylor > 0).all()) and len(unit_rates(first).unique()) > 1


def importance(values: list[float], units: Units) -> UnitImportance:
    tensor = torch.tensor(values, dtype=torch.float64)
    return UnitImportance(units, tensor, tensor)


@pytest.mark.slow
def test_rates_by_rank_have_mean_one_within_a_kind_and_fall_with_importance() -> None:
    units = Units.of(expanded(), "neuron")
    values = torch.rand(len(units), generator=torch.Generator().manual_seed(2)).tolist()
    rates = unit_rates(importance(values, units))
    for kind in {unit.kind for unit in units}:
        among = [index for index, unit in enumerate(units) if unit.kind == kind]
        sizes = units.sizes[among].double()
        assert float((rates[among] * sizes).sum() / sizes.sum()) == pytest.approx(1)
        order = sorted(among, key=lambda index: values[index])
        assert rates[order].tolist() == sorted(rates[order].tolist(), reverse=True)
        assert 0 < rates[among].min() and rates[among].max() < 2
    pair = Units.of(expanded())
    assert unit_rates(importance([1.0] * 9 + [2.0] * 9, pair)).tolist() == [1.5] * 9 + [0.5] * 9
    assert unit_rates(importance([1.0] * 18, pair)).tolist() == [1.0] * 18
    three = Units.of(expand_model(tiny_models.model(), [0, 1, 2]))
    shared = unit_rates(importance([1.0] * 18 + [2.0] * 9, three))
    assert shared.tolist() == pytest.approx([4 / 3] * 18 + [1 / 3] * 9), "ties share their mean rank"


def test_the_paper_s_map_and_the_one_that_preserves_the_mean() -> None:
    units = Units.of(expanded())
    values = [float(index) for index in range(18)]
    paper = unit_rates(importance(values, units), "paper")
    assert torch.allclose(paper, torch.tensor([2 * (1 - value / 17) for value in values], dtype=torch.float64))
    kept = unit_rates(importance(values, units), "mean_preserving")
    sizes = units.sizes.double()
    assert float((kept * sizes).sum() / sizes.sum()) == pytest.approx(1)
    assert torch.allclose(kept / kept[0], paper / paper[0])
    assert unit_rates(importance([3.0] * 18, units), "paper").tolist() == [1.0] * 18


def test_callable_maps_are_checked() -> None:
    units = Units.of(expanded())
    given = importance([1.0] * 18, units)
    assert unit_rates(given, lambda values, units: values * 0.5).tolist() == [0.5] * 18
    for bad in (lambda values, units: values[:3], lambda values, units: -values, lambda values, units: values / 0):
        with pytest.raises(InputError, match="finite values >= 0"):
            unit_rates(given, bad)
    with pytest.raises(InputError, match="^map must be one of"):
        unit_rates(given, "ranks")
    with pytest.raises(InputError, match="q_proj is not finite"):
        unit_rates(importance([float("nan")] * 18, units))


def test_the_gain_that_keeps_a_post_norm_copy_silent_is_never_slowed() -> None:
    model = expand_model(tiny_models.model("gemma2", head_dim=8), [1, 3])
    units = Units.of(model)
    gates = [index for index, unit in enumerate(units) if unit.gate]
    assert {units.units[index].kind for index in gates} == {"post_attention_layernorm", "post_feedforward_layernorm"}
    values = torch.arange(len(units)).flip(0).tolist()
    free = unit_rates(importance(values, Units(units.granularity, tuple(replace(unit, gate=False) for unit in units), units.slices)))
    held = unit_rates(importance(values, units))
    assert float(free[gates].min()) < 1 and float(held[gates].min()) >= 1
    others = [index for index in range(len(units)) if index not in gates]
    assert torch.equal(free[others], held[others])
    assert float(unit_rates(importance(values, units), lambda found, units: found * 0)[gates].min()) == 1
