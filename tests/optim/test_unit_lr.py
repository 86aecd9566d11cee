"""Rates by name, by pattern and for a whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adept_fast import AdamW, InputError


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(4, 6), "norm": nn.LayerNorm(4)}) for _ in range(3))})


def rates(optimizer: AdamW) -> dict[str, list[float]]:
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    found = {name: optimizer.unit_lr(name) for name in names}
    return {name: each[0].reshape(-1).tolist() for name, each in found.items() if each is not None}


def test_a_pattern_sets_the_rate_of_every_name_that_it_matches() -> None:
    model = blocks()
    optimizer = AdamW([{"params": [*model.named_parameters()][:5]}, {"params": [*model.named_parameters()][5:]}])
    optimizer.set_unit_lr("layers.*.mlp.*", 0.5)
    assert rates(optimizer) == {f"layers.{i}.mlp.{part}": [0.5] for i in range(3) for part in ("weight", "bias")}
    optimizer.set_unit_lr("layers.1.*", None)
    assert [*rates(optimizer)] == [f"layers.{i}.mlp.{part}" for i in (0, 2) for part in ("weight", "bias")]
    optimizer.set_unit_lr("layers.2.mlp.weight", torch.tensor([0.0, 1, 0, 1, 0, 1]))
    before = model["layers"][2]["mlp"].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = (model["layers"][2]["mlp"].weight != before).any(1)
    assert moved.tolist() == [False, True] * 3


def test_a_dict_sets_the_rates_of_a_model_or_none_of_them() -> None:
    model = blocks()
    optimizer = AdamW(model.named_parameters())
    first = model["layers"][0]["norm"].weight
    optimizer.set_unit_lr({"layers.*.norm.bias": 0.0, first: torch.arange(4) / 2, "layers.1.mlp.weight": torch.ones(6)})
    found = rates(optimizer)
    assert found.pop("layers.0.norm.weight") == [0, 0.5, 1, 1.5] and found.pop("layers.1.mlp.weight") == [1.0] * 6
    assert found == {f"layers.{i}.norm.bias": [0.0] for i in range(3)}
    before = rates(optimizer)
    with pytest.raises(InputError, match=r"layers.0.norm.bias: multipliers: shape \(6,\) from dim=0 does not fit"):
        optimizer.set_unit_lr({"layers.1.mlp.weight": 0.3, "layers.*.norm.bias": torch.ones(6)})
    assert rates(optimizer) == before
    with pytest.raises(InputError, match="multipliers: param is a dict, which has them: leave multipliers out"):
        optimizer.set_unit_lr({first: 1.0}, 0.5)


def test_names_that_match_nothing_and_parameters_without_names() -> None:
    model = blocks()
    optimizer = AdamW(model.named_parameters())
    with pytest.raises(InputError, match=r"param: no parameter's name matches 'layer.0.mlp.weight'; names are such as layers.0.mlp.weight"):
        optimizer.set_unit_lr("layer.0.mlp.weight", 0.5)
    with pytest.raises(InputError, match=r"'layers.0.\*' matches 4 parameters: give one name"):
        optimizer.unit_lr("layers.0.*")
    with pytest.raises(InputError, match=r"is a name, but the parameters have none: give AdamW model.named_parameters\(\)"):
        AdamW(model.parameters()).set_unit_lr("layers.*", 0.5)


def test_rates_by_name_survive_a_state_dict() -> None:
    model, other = blocks(), blocks()
    optimizer, again = AdamW(model.named_parameters()), AdamW(other.named_parameters())
    optimizer.set_unit_lr("layers.2.*", 0.25)
    again.load_state_dict(optimizer.state_dict())
    assert rates(again) == rates(optimizer) != {}
