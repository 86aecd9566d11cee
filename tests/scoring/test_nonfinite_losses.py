"""Losses that are no numbers: of the model itself they stop scoring with item and cause, of a masked part they rank above all others."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adept_fast import InputError, LayerScores, Race, Units, mask_units, score_layers, score_units, select_layers, selection_stability
from adept_fast.evaluation.evaluate_model import evaluate
from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.expansion.expand_model import expand_model
from adept_fast.expansion.first_importance import first_importance
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.report.charts import layer_profile
from adept_fast.runtime.bootstrap import bootstrap
from adept_fast.scoring.stability import corpus_conflicts
from tests.support import tiny_models


def broken(value: float, name: str = "model.layers.2.mlp.up_proj.weight", **changes):
    model = tiny_models.model(**changes)
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = value
    return model


MEASURES = {
    "masking": lambda model, items: score_layers(model, items),
    "kl": lambda model, items: score_layers(model, items, loss="kl"),
    "race": lambda model, items: score_layers(model, items, race=Race(1, first=8)),
    **{
        method: lambda model, items, method=method: score_layers(model, items, method)
        for method in ("gate", "cumulative", "rank", "fisher", "block_influence")
    },
    "units": lambda model, items: mask_units(model, items),
    "importance": lambda model, items: score_units(expand_model(model, [1]), items, Units.of(expand_model(model, [1]))),
    "first importance": lambda model, items: first_importance(expand_model(model, [1]), items),
    "evaluation": lambda model, items: evaluate(model, EvaluationCorpus("general", tuple(items)), None),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_a_weight_that_is_no_number_is_named_by_whatever_measures(measure, value, word):
    with pytest.raises(InputError, match=rf"item \d is not finite: model\.layers\.[23]\.mlp\.up_proj\.weight holds {word}"):
        MEASURES[measure](broken(value), tiny_models.items(8))


def test_the_item_that_overflows_is_named_and_the_dtype():
    model, items = tiny_models.model(dtype=torch.float16), tiny_models.items(3)
    rare = next(token for token in items[2].input_ids[:3] if all(token not in item.input_ids for item in items[:2]))
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = 65000
        decoder_layers(model)[0].mlp.down_proj.weight *= 500
    with pytest.raises(InputError, match="item 2 is not finite: its weights are finite, but float16 overflows above 65504: take dtype"):
        score_layers(model, items)


def gated(monkeypatch, dead: int = 2):
    """A model that has no finite loss without layer `dead`: what it adds keeps a later division from 0 / 0."""
    model = tiny_models.model()
    after = decoder_layers(model)[3]
    own = after.forward
    with torch.no_grad():
        for layer, module in enumerate(decoder_layers(model)):
            for projection in (module.self_attn.o_proj, module.mlp.down_proj):
                projection.weight[0] = 1e-3 if layer == dead else 0.0
        model.get_input_embeddings().weight[:, 0] = 0.0

    def divided(hidden, *args, **kwargs):
        return own(hidden + 0 * hidden[..., :1] / hidden[..., :1], *args, **kwargs)

    monkeypatch.setattr(after, "forward", divided)
    return model


def test_a_layer_without_which_no_loss_is_left_ranks_above_all_others(monkeypatch, tmp_path):
    model, items = gated(monkeypatch), tiny_models.items(8)
    scores = score_layers(model, items, losses=("kl", "all"), domain=items[:4], journal=tmp_path / "journal")
    plain = {layer: scores.values[layer] for layer in (0, 1, 3)}
    assert scores.values[2] == scores.low[2] == scores.high[2] == math.inf and all(map(math.isfinite, plain.values()))
    assert all(profile.values[2] == math.inf for profile in scores.profiles.values())
    assert any("without layer 2 the loss (answer) of 8 of 8 items is not finite" in note for note in scores.notes)
    assert select_layers(scores, 3) == [0, 1, 3]
    assert score_layers(model, items, losses=("kl", "all"), journal=tmp_path / "journal").values == scores.values
    assert "NaN" not in (tmp_path / "journal").read_text() and "Infinity" not in (tmp_path / "journal").read_text()
    stability = selection_stability(scores, [0, 1, 3])
    assert stability["sizes"][-1]["same"] == 1.0
    assert corpus_conflicts(scores, "answer", "domain")["ranks"]["answer"][2] == [3.0, 3.0, 3.0]
    scores.save(tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["profiles"]["answer"]["values"][2] is None
    assert LayerScores.load(tmp_path / "scores.json").profiles == scores.profiles
    layer_profile(scores, [0])
    content["profiles"]["answer"]["values"][1] = math.nan
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="scores.json: not as it was written .TypeError: it holds a NaN.: delete it"):
        LayerScores.load(tmp_path / "scores.json")


@pytest.mark.slow
def test_a_race_drops_such_a_layer(monkeypatch):
    model, items = gated(monkeypatch), tiny_models.items(40)
    whole = score_layers(model, items)
    raced = score_layers(model, items, race=Race(1, regret=0.0, first=8))
    assert raced.certificate["layers"] == select_layers(whole, 1)
    assert raced.certificate["measured_items"][2] <= 10 and raced.values[2] == math.inf


def test_units_without_which_no_loss_is_left(monkeypatch):
    scores = mask_units(gated(monkeypatch), tiny_models.items(3), layers=[2])
    found = dict(zip(scores.kinds, scores.values, strict=True))
    assert math.isfinite(found["self_attn.o_proj"]) and all(not math.isnan(value) for value in (*scores.low, *scores.high))


def test_intervals_of_items_that_are_infinite():
    generator = torch.Generator().manual_seed(3)
    sums, weights = torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.full((40,), 2.0)
    plain = bootstrap(sums, weights)
    sums[7, 1] = sums[:, 2] = math.inf
    value, low, high = bootstrap(sums, weights)
    assert [value[0], low[0], high[0]] == [plain[0][0], plain[1][0], plain[2][0]]
    assert value[1] == high[1] == math.inf and low[1].isfinite()  # a third of the resamples lack the item
    assert value[2] == low[2] == high[2] == math.inf
