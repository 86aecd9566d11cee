"""Anchor, meter, monitors, rates and proofs on corpora and arguments that hold nothing to measure."""

from __future__ import annotations

import pytest
import torch

from adept_fast import AdamW, Anchor, InputError, Units, apply_rates, expand_model, verify_expansion
from adept_fast.data.items import Item
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.monitor import Monitor
from tests.support import tiny_models

NOTHING = [Item((5, 6, 7), (5, -100, -100)), Item((5,), (5,)), Item((), ())]


def test_corpora_without_a_target_are_refused() -> None:
    with pytest.raises(InputError, match="monitors: general has no item with a supervised token"):
        Monitor({"general": NOTHING}, 5)
    with pytest.raises(InputError, match="items with a supervised token"):
        Meter(NOTHING)
    with pytest.raises(InputError, match="items with a token"):
        Anchor(NOTHING[2:], 0.5)


def test_an_anchor_leaves_empty_items_out() -> None:
    model = expand_model(tiny_models.model(num_hidden_layers=2), [0])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.1)
    found = [Anchor(items, 0.5, every=1).backward(model, 1) for items in (NOTHING, NOTHING[:2])]
    assert float(found[0]) > 0 and torch.equal(*found)


def test_units_and_rates_of_another_model_are_refused() -> None:
    model, other = (expand_model(tiny_models.model(num_hidden_layers=2, hidden_size=width), [0]) for width in (32, 64))
    units, optimizer = Units.of(model, "neuron"), AdamW(model.parameters())
    with pytest.raises(InputError, match="is .* in this model, not cut so"):
        apply_rates(optimizer, other, units, torch.ones(len(units)))
    with pytest.raises(InputError, match="is no parameter of this model"):
        apply_rates(optimizer, tiny_models.model(num_hidden_layers=1), units, torch.ones(len(units)))
    for rates in (torch.ones(len(units) + 1), -torch.ones(len(units)), torch.full((len(units),), torch.nan)):
        with pytest.raises(InputError, match=f"rates must be {len(units)} finite values >= 0"):
            apply_rates(optimizer, model, units, rates)


NO_TOKENS = [torch.zeros(0, 5, dtype=torch.int64), torch.zeros(2, 5), torch.full((1, 2), 300), torch.tensor([3])]


@pytest.mark.parametrize("inputs", NO_TOKENS, ids=str)
def test_a_proof_on_no_tokens_is_none(inputs: torch.Tensor) -> None:
    model = tiny_models.model(num_hidden_layers=2)
    with pytest.raises(InputError, match="inputs must be"):
        verify_expansion(model, expand_model(model, [0]), inputs)
