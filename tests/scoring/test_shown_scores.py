"""The DataFrame, the plot and the line of text of scores, and scores by a method of one's own."""

from __future__ import annotations

import math

import pytest
import torch

from adept_fast import InputError, compare_scores, mask_units, score_layers, select_layers
from adept_fast.data.items import Item
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring.profile import Profile
from adept_fast.scoring.scores import LayerScores
from tests.support import tiny_models


def norm_of_output(model: torch.nn.Module, items: list[Item]) -> torch.Tensor:
    norms = [layer.mlp.down_proj.weight.norm() for layer in decoder_layers(model)]
    return torch.stack([torch.stack(norms) * len(item.input_ids) for item in items])


def test_table_and_plot_hold_the_values_and_intervals() -> None:
    scores = score_layers(tiny_models.model(), tiny_models.items(4), losses=["all"])
    table = scores.to_dataframe()
    assert list(table.columns) == ["answer", "answer_low", "answer_high", "all", "all_low", "all_high"]
    assert tuple(table["answer"]) == scores.values and tuple(table["all_high"]) == scores.profiles["all"].high
    chosen = select_layers(scores, k=2)
    assert sorted(table.nsmallest(2, "answer").index) == chosen
    others, marked = scores.plot(chosen).containers
    assert marked.lines[0].get_xdata().tolist() == chosen
    assert others.lines[0].get_ydata().tolist() == [value for layer, value in enumerate(scores.values) if layer not in chosen]
    assert f"lowest of 4: {chosen[0]}: " in repr(scores) or f"lowest of 4: {chosen[1]}: " in repr(scores)
    assert "<table" in scores._repr_html_()
    assert scores.plot(loss="all").containers[0].lines[0].get_ydata().tolist() == list(scores.profiles["all"].values)
    with pytest.raises(InputError, match="loss must be one of those measured, answer, all, found 'kl'"):
        scores.plot(loss="kl")
    with pytest.raises(InputError, match="chosen must be indices from 0 to 3, each once, found \\[4\\]"):
        scores.plot([4])


def test_a_layer_without_a_finite_loss_is_not_drawn() -> None:
    profile = Profile((math.inf, 1.0, 2.0), (math.inf, 0.5, 1.0), (math.inf, 1.5, 3.0), 2.0)
    scores = LayerScores(method="masking", loss="answer", profiles={"answer": profile}, items=1, tokens=1, seconds=0.0)
    assert scores.plot().containers[0].lines[0].get_xdata().tolist() == [1, 2]


def test_units_are_named_by_layer_and_kind() -> None:
    table = mask_units(tiny_models.model(), tiny_models.items(2), layers=[1]).to_dataframe()
    assert table.index.names == ["layer", "kind"] and table.loc[(1, "self_attn.q_proj")].notna().all()


def test_a_method_of_ones_own_is_scored_compared_and_selected_by() -> None:
    model, items = tiny_models.model(), tiny_models.items(4)
    scores = score_layers(model, items, method=norm_of_output)
    expected = norm_of_output(model, items).double().mean(0)
    torch.testing.assert_close(torch.tensor(scores.values, dtype=torch.float64), expected)
    assert scores.method == "norm_of_output()" and select_layers(scores, k=1) == [int(expected.argmin())]
    assert compare_scores([scores, score_layers(model, items)])["names"] == ["norm_of_output()", "masking, answer"]


@pytest.mark.parametrize("wrong", [lambda model, items: torch.zeros(4), lambda model, items: torch.full((len(items), 4), math.nan)])
def test_a_method_that_returns_something_else_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=r"a score of each item and layer, \[2, 4\] without NaN, found"):
        score_layers(tiny_models.model(), tiny_models.items(2), method=wrong)
