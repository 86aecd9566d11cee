"""Masking by one sweep equals bypassing each layer in turn, on every kind of model it meets."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring import packs, sweep
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.scores import LayerScores
from adept_fast.scoring.select_layers import select_layers, undecided
from adept_fast.scoring.settings import LOSSES
from tests.support import tiny_families, tiny_models

OTHERS = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0},
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


_CUT = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
CUT = {  # what of the last layer needs the supervised rows alone: not what gives keys and values
    "phi3": _CUT[1:],
    "gemma2": (*_CUT, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("post_attention_layernorm", "attention.dense", "mlp"),
    "cohere": _CUT[:3],
    "opt": ("self_attn.q_proj", "self_attn.out_proj"),
}


def by_hooks(model: torch.nn.Module, items: list) -> dict[str, list[float]]:
    """The plain definition: a forward hook returns the layer's input in place of its output, one layer at a time, all logits kept."""

    def bypass(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def losses(item: object) -> tuple[float, float, torch.Tensor]:
        with torch.no_grad():
            logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1].double()
        ids, labels = torch.tensor(item.input_ids[1:]), torch.tensor(item.labels[1:])
        answer = functional.cross_entropy(logits, labels, reduction="sum").item()
        return answer, functional.cross_entropy(logits, ids, reduction="sum").item(), logits[labels != -100].log_softmax(-1)

    tokens, positions = sum(item.supervised for item in items), sum(len(item.input_ids) - 1 for item in items)
    base = [losses(item) for item in items]
    found: dict[str, list[float]] = {"answer": [], "all": [], "kl": []}
    for layer in decoder_layers(model):
        handle = layer.register_forward_hook(bypass, with_kwargs=True)
        masked = [losses(item) for item in items]
        handle.remove()
        pairs = list(zip(masked, base, strict=True))
        found["answer"].append(sum(without[0] - with_[0] for without, with_ in pairs) / tokens)
        found["all"].append(sum(without[1] - with_[1] for without, with_ in pairs) / positions)
        found["kl"].append(sum(float((with_[2].exp() * (with_[2] - without[2])).sum()) for without, with_ in pairs) / tokens)
    return found


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *OTHERS])
def test_sweep_equals_bypassing_each_layer_in_turn(family: str) -> None:
    model = tiny_models.model(family, **OTHERS.get(family, {}))
    items = tiny_models.items(4)
    scores = score_layers(model, items, loss="all", losses=LOSSES)
    expected = by_hooks(model, items)
    assert not scores.notes, "the sweep was not used"
    for name, values in expected.items():
        assert max(map(abs, values)) > 0.01, "a bypass that changes nothing tests nothing"
        torch.testing.assert_close(torch.tensor(scores.profiles[name].values), torch.tensor(values), atol=1e-4, rtol=0)
    assert min(scores.profiles["kl"].values) > 0
    answers = score_layers(model, items)  # of the last layer some modules run on the supervised rows alone
    torch.testing.assert_close(torch.tensor(answers.values), torch.tensor(expected["answer"]), atol=1e-4, rtol=0)
    assert sweep.plan(model, items).rowwise == CUT.get(family, _CUT)


def test_memory_bound_changes_nothing() -> None:
    model, items = tiny_models.model(), tiny_models.items(3)
    whole = score_layers(model, items, loss="all", losses=LOSSES)
    parts = score_layers(model, items, loss="all", losses=LOSSES, sweep_tokens=7)
    for name in whole.profiles:
        torch.testing.assert_close(torch.tensor(parts.profiles[name].values), torch.tensor(whole.profiles[name].values), atol=1e-5, rtol=0)


def test_model_that_cannot_be_swept_is_scored_one_by_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_models.model(), tiny_models.items(3)
    expected = score_layers(model, items)

    def broken(*given: object) -> torch.Tensor:
        raise RuntimeError("shapes do not broadcast")

    monkeypatch.setattr(sweep._Wavefront, "_run", broken)
    scores = score_layers(model, items)
    assert "one forward a layer" in scores.notes[0]
    torch.testing.assert_close(torch.tensor(scores.values), torch.tensor(expected.values), atol=1e-5, rtol=0)


def test_model_is_left_as_it_was() -> None:
    model = tiny_models.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    score_layers(model, tiny_models.items(2))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_journal_resumes_to_the_same_bits(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_models.model(), tiny_models.items(9)
    path = tmp_path / "journal"
    whole = score_layers(model, items, sweep_tokens=240, journal=path)
    lines = path.read_text().splitlines(keepends=True)
    assert 1 + 3 < len(lines) < 1 + len(items), "items were not packed, or all into one pack"
    path.write_text("".join(lines[:3]) + lines[3][:10])  # killed in the middle of the third pack's line
    measured = []
    measure = LayerMasks.measure
    monkeypatch.setattr(LayerMasks, "measure", lambda *given: measured.append(given) or measure(*given))
    resumed = score_layers(model, items, sweep_tokens=240, journal=path)
    assert resumed.profiles == whole.profiles and len(measured) == len(lines) - 3
    for others in ((model, tiny_models.items(9, seed=8)), (tiny_models.model(seed=4), items)):
        again = score_layers(*others, sweep_tokens=240, journal=path)
        assert again.profiles != whole.profiles, "another probe's or model's rows were taken"


def test_items_are_packed_whole_and_cut_behind_what_counts() -> None:
    items = tiny_models.items(12)
    made = packs.pack(items, range(12), 60)
    assert sorted(index for pack in made for index in pack.items) == list(range(12)) and len(made) < 12
    for pack in made:
        assert pack.tokens <= 60 and pack.positions.tolist() == [at for length in pack.lengths for at in range(length)]
        for place, index in enumerate(pack.items):
            item, rows = items[index], pack.rows[pack.owners == place] - sum(pack.lengths[:place])
            assert pack.lengths[place] == len(item.input_ids) - 1  # the last token predicts nothing
            assert pack.targets[pack.owners == place].tolist() == [label for label in item.labels[1:] if label != -100]
            assert [item.labels[row + 1] != -100 for row in rows.tolist()] == [True] * item.supervised
    question = Item(tuple(range(3, 23)), (-100,) * 8 + (11,) + (-100,) * 11)
    assert packs.pack([question], [0], 60)[0].tokens == 8 and packs.pack([question], [0], 60, all_tokens=True)[0].tokens == 19


@pytest.mark.parametrize(
    ("family", "cut"),
    [
        ("gpt2", None),  # reshapes what its last layer gives to the shape of its input
        ("gemma4_text", (*_CUT[:2], "mlp", *(f"{place}_layernorm" for place in ("post_attention", "pre_feedforward", "post_feedforward")))),
        ("llama4_text", (*_CUT[:2], _CUT[3])),  # its base_model is itself
        ("xglm", ()),  # wants a mask for each variant
        # its final norm stands behind what calls the layers
        ("roberta-prelayernorm", ("attention.self.query", "attention.output.dense", "intermediate", "output.dense")),
    ],
)
def test_family_that_differs_from_the_others(family: str, cut: tuple[str, ...] | None) -> None:
    model, items = tiny_families.model(family, vocab_size=tiny_models.VOCABULARY), tiny_models.items(3)
    assert sweep.plan(model, items).rowwise == cut
    scores = score_layers(model, items)
    torch.testing.assert_close(torch.tensor(scores.values), torch.tensor(by_hooks(model, items)["answer"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "swept"), [("mpt", True), ("bloom", False), ("mamba", True)])
def test_family_that_leaks_across_documents_takes_one_item_a_row(family: str, swept: bool) -> None:
    """MPT and Mamba see no document's end, Bloom's position bias does not broadcast over variants: it is noticed, and scored right."""
    changes = {"mpt": {"n_layers": 4, "n_heads": 4, "d_model": 32}, "bloom": {"n_layer": 4, "n_head": 4}}
    model, items = tiny_models.model(family, **changes.get(family, {})), tiny_models.items(4)
    planned = sweep.plan(model, items)
    assert (planned.swept, planned.pack) == (swept, 0)
    scores = score_layers(model, items)
    torch.testing.assert_close(torch.tensor(scores.values), torch.tensor(by_hooks(model, items)["answer"]), atol=1e-4, rtol=0)
    assert len(scores.notes) == (not swept)


def test_scores_round_trip(tmp_path) -> None:
    scores = score_layers(tiny_models.model(), tiny_models.items(3))
    scores.save(tmp_path / "scores.json")
    loaded = LayerScores.load(tmp_path / "scores.json")
    assert loaded == scores and torch.equal(loaded.per_item["answer"].sums, scores.per_item["answer"].sums)
    assert loaded.per_item["answer"].profile("masking") == scores.profiles["answer"]
    content = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        LayerScores.load(tmp_path / "scores.json")


def test_interval_covers_and_narrows() -> None:
    model, items = tiny_models.model(), tiny_models.items(40)
    few, many = score_layers(model, items[:5]), score_layers(model, items)
    for layer in range(4):
        assert few.low[layer] <= few.values[layer] <= few.high[layer]
        assert many.high[layer] - many.low[layer] < few.high[layer] - few.low[layer]


@pytest.mark.parametrize("change", [{"method": "maskin"}, {"loss": "answers"}])
def test_unknown_method_or_loss(change: dict[str, str]) -> None:
    with pytest.raises(InputError, match="must be one of"):
        score_layers(tiny_models.model(), tiny_models.items(2), **change)


def test_selection() -> None:
    scores = score_layers(tiny_models.model(num_hidden_layers=6), tiny_models.items(6), loss="kl")
    order = sorted(range(6), key=lambda layer: scores.values[layer])
    assert select_layers(scores, 2) == sorted(order[:2])
    assert select_layers(scores, 3, "uniform") == [1, 3, 5]
    banded = select_layers(scores, 2, "lowest_per_band")
    assert banded[0] == min(range(3), key=lambda layer: scores.values[layer]) and banded[1] >= 3
    chosen = select_layers(scores, 2)
    limit = max(scores.high[layer] for layer in chosen)
    assert undecided(scores, chosen) == [layer for layer in range(6) if layer not in chosen and scores.low[layer] < limit]
    for k in (0, 7, -1, True):
        with pytest.raises(InputError, match="from 1 to 6"):
            select_layers(scores, k)
    with pytest.raises(InputError, match="placement"):
        select_layers(scores, 2, "lowst")
