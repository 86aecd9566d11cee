"""Scoring a model that accelerate spread over devices: part of its weights on disk, loaded by hooks for each forward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adept_fast import mask_units, score_layers
from adept_fast.errors import InputError
from adept_fast.scoring.unit_importance import parameter_sums
from tests.support import tiny_models

pytestmark = pytest.mark.slow

pytest.importorskip("accelerate")
WHOLE = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS = {
    "upper layers on disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"},
    "everything on disk": dict.fromkeys([*WHOLE, "model.embed_tokens", *(f"model.layers.{layer}" for layer in range(4))], "disk"),
    "embedding and most layers on disk": {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "disk"},
}


@pytest.mark.parametrize("name", MAPS)
def test_offloaded_weights_give_the_same_scores(name: str, tmp_path) -> None:
    tiny_models.checkpoint(tmp_path / "model", tie_word_embeddings=False)
    placed = {**WHOLE, "model.layers.2": "cpu", "model.layers.3": "disk", **MAPS[name]}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offload")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert any(parameter.is_meta for parameter in spread.parameters()), "nothing was offloaded"
    items = tiny_models.items(6)
    found, wanted = (score_layers(model, items, losses=("kl", "all"), sweep_tokens=160) for model in (spread, whole))
    assert not found.notes, "the sweep was given up"
    for loss, profile in wanted.profiles.items():
        torch.testing.assert_close(torch.tensor(found.profiles[loss].values), torch.tensor(profile.values), atol=1e-6, rtol=0)
    assert found.costs == wanted.costs
    influences = [score_layers(model, items, "block_influence").values for model in (spread, whole)]
    assert influences[0] == pytest.approx(influences[1], rel=1e-5)
    units, expected = (mask_units(model, items, layers=[1, 3]) for model in (spread, whole))
    torch.testing.assert_close(torch.tensor(units.values), torch.tensor(expected.values), atol=1e-6, rtol=0)
    assert any(parameter.is_meta for parameter in spread.parameters()), "scoring loaded the model for good"
    with pytest.raises(InputError, match="score by masking"):
        score_layers(spread, items, "fisher")
    with pytest.raises(InputError, match="layers.3.mlp.up_proj.weight: offloaded"):
        parameter_sums(spread, items, {"model.layers.3.mlp.up_proj.weight": (0,)})
