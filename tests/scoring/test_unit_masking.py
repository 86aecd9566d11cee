"""Masking the parts of layers against masking each by itself, by hand, in plain forwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from adept_fast import _C as native
from adept_fast import mask_units
from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.report.units_chart import unit_profile
from adept_fast.scoring import sweep
from adept_fast.scoring.scores import UnitScores
from adept_fast.scoring.unit_masking import forwards, masked_units
from tests.support import tiny_families, tiny_models


def losses(model: torch.nn.Module, items: list) -> list[float]:
    found = []
    with torch.no_grad():
        for item in items:
            logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1]
            found.append(float(functional.cross_entropy(logits.double(), torch.tensor(item.labels[1:]), reduction="sum")))
    return found


def zeroed(output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    if isinstance(output, tuple):
        return tuple(map(zeroed, output))
    return torch.zeros_like(output) if output.is_floating_point() else output


def by_hand(model: torch.nn.Module, items: list, granularity: str, layers: list[int]) -> dict[tuple[int, str], float]:
    """Loss increase with an output hooked to 0, or with columns of an output projection's weight set to 0: nats per supervised token."""
    tokens, base, found = sum(item.supervised for item in items), sum(losses(model, items)), {}
    for layer in layers:
        for path, module in decoder_layers(model)[layer].named_modules():
            name, branch = path.rpartition(".")[2], path.rpartition(".")[0]
            if getattr(module, "weight", None) is None or module.weight.ndim != 2:
                continue
            if granularity == "tensor":
                handle = module.register_forward_hook(lambda *given: zeroed(given[2]))
                found[layer, path] = (sum(losses(model, items)) - base) / tokens
                handle.remove()
            elif name in ("o_proj", "down_proj", "dense", "dense_4h_to_h"):
                dense = name in ("down_proj", "dense_4h_to_h")
                groups = 8 if dense else model.config.num_key_value_heads if hasattr(model.config, "num_key_value_heads") else 4
                width = module.weight.shape[1] // groups
                for group in range(groups):
                    kept = module.weight.detach().clone()
                    with torch.no_grad():
                        module.weight[:, group * width : (group + 1) * width] = 0
                    found[layer, f"{branch}[{group}]"] = (sum(losses(model, items)) - base) / tokens
                    with torch.no_grad():
                        module.weight.copy_(kept)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"head_dim": 32}), ("phi3", {}), ("gpt_neox", {}), ("mixtral", {"num_local_experts": 4})],
)
def test_units_are_masked_as_by_hand(family: str, changes: dict, granularity: str) -> None:
    model, items = tiny_models.model(family, **changes), tiny_models.items(5)
    assert sweep.plan(model, items).native == ("head_dim" in changes)
    layers = [0, 2, 3]
    wanted = by_hand(model, items, granularity, layers)
    found = mask_units(model, items, granularity, layers=layers, losses=("kl",), sweep_tokens=150)
    assert list(zip(found.layers, found.kinds, strict=True)) == list(wanted)
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(list(wanted.values())), atol=1e-5, rtol=1e-4)
    assert all(low <= value <= high for value, low, high in zip(found.values, found.low, found.high, strict=True))
    assert min(found.profiles["kl"].values) > 0 and found.profiles["answer"].base_loss > 0
    assert max(map(abs, found.values)) > 0.05, "nothing was masked"


def test_items_of_a_pack_are_kept_apart_in_native_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_models.model(head_dim=32), tiny_models.items(5)
    calls, own = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *given: calls.append(given[11]) or own(*given))
    found = mask_units(model, items, layers=[1])
    assert max(map(len, calls[-3:])) > 1, "items were not packed"
    wanted = by_hand(model, items, "tensor", [1])
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(list(wanted.values())), atol=1e-5, rtol=1e-4)


def test_family_that_takes_no_batch_of_variants_goes_one_by_one() -> None:
    model, items = tiny_models.model("bloom", n_layer=4, n_head=4), tiny_models.items(2)
    found = mask_units(model, items, layers=[3])
    wanted = by_hand(model, items, "tensor", [3])
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(list(wanted.values())), atol=1e-5, rtol=1e-4)


def test_model_is_left_as_it_was_and_a_killed_call_resumes(tmp_path) -> None:
    model, items = tiny_models.model().train(), tiny_models.items(6)
    path = tmp_path / "journal"
    whole = mask_units(model, items, layers=[1], sweep_tokens=320, journal=path)
    lines = path.read_text().splitlines(keepends=True)
    assert model.training and len(lines) > 2
    assert all("forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    path.write_text("".join(lines[:2]) + lines[2][:9])
    resumed = mask_units(model, items, layers=[1], sweep_tokens=320, journal=path)
    assert resumed.profiles == whole.profiles
    whole.save(tmp_path / "unit_scores.json")
    loaded = UnitScores.load(tmp_path / "unit_scores.json")
    assert loaded == whole and torch.equal(loaded.per_item["answer"].sums, whole.per_item["answer"].sums)


@pytest.mark.parametrize("family, module", [("mamba", "mixer.dt_proj"), ("jamba", "mamba.dt_proj")])
def test_weights_that_are_read_without_a_call_are_masked_too(family: str, module: str) -> None:
    model, items = tiny_families.model(family).train(), [in_small_vocabulary(item) for item in tiny_models.items(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = mask_units(model, items, layers=[0, 2])
    assert model.training and all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    values = dict(zip(zip(found.layers, found.kinds, strict=True), found.values, strict=True))
    model.eval()
    tokens, base = sum(item.supervised for item in items), sum(losses(model, items))
    for layer in (0, 2):
        with torch.no_grad():
            for parameter in decoder_layers(model)[layer].get_submodule(module).parameters():
                parameter.zero_()
        wanted = (sum(losses(model, items)) - base) / tokens
        model.load_state_dict(before)
        assert abs(wanted) > 1e-4 and abs(values[layer, module] - wanted) <= 1e-5 + 1e-4 * abs(wanted)


def in_small_vocabulary(item: Item) -> Item:
    ids = tuple(token % tiny_families.VOCABULARY for token in item.input_ids)
    return Item(ids, tuple(label if label < 0 else ids[at] for at, label in enumerate(item.labels)))


@pytest.mark.slow
def test_heads_of_a_state_space_model_are_masked_as_by_hand() -> None:
    model, items = tiny_families.model("mamba2"), [in_small_vocabulary(item) for item in tiny_models.items(3)]
    found = mask_units(model, items, "head", layers=[1])
    assert len(found.values) == model.config.num_heads == 8
    tokens, base, weight = sum(item.supervised for item in items), sum(losses(model, items)), decoder_layers(model)[1].mixer.out_proj.weight
    kept = weight.detach().clone()
    for head, value in enumerate(found.values):
        with torch.no_grad():
            weight.view(len(weight), 8, -1)[:, head] = 0
        assert value == pytest.approx((sum(losses(model, items)) - base) / tokens, rel=1e-4, abs=1e-5)
        with torch.no_grad():
            weight.copy_(kept)
    assert max(map(abs, found.values)) > 1e-3


def test_a_module_that_takes_no_part_loses_nothing_and_the_model_is_left_as_it_was() -> None:
    model = tiny_models.model().train()
    spare = decoder_layers(model)[1].spare = torch.nn.Linear(3, 3)
    before = spare.weight.clone()
    found = mask_units(model, tiny_models.items(2), layers=[1])
    values = dict(zip(found.kinds, found.values, strict=True))
    assert values.pop("spare") == pytest.approx(0, abs=1e-6) and min(map(abs, values.values())) > 1e-6 and spare.weight.equal(before)
    assert model.training and all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_cost_is_known_and_what_is_wrong_refused() -> None:
    model = tiny_models.model()
    assert forwards(masked_units(model, "tensor", [1, 3]), 4) == 1 + (7 * 3 + 7 * 1) / 4
    assert len(masked_units(model, "head")) == 4 * (2 + 8)
    refused = (({"granularity": "neuron"}, "one of tensor, head"), ({"layers": [4]}, "from 0 to 3"), ({"loss": "x"}, "loss must be"))
    for wrong, message in refused:
        with pytest.raises(InputError, match=message):
            mask_units(model, tiny_models.items(2), **wrong)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_picture_has_a_place_for_each_unit(granularity: str) -> None:
    found = mask_units(tiny_models.model(), tiny_models.items(3), granularity)
    figure = unit_profile(found)
    axes, bar = figure.axes
    kinds = list(dict.fromkeys(found.kinds))
    assert [label.get_text() for label in axes.get_yticklabels()] == kinds
    assert axes.collections[0].get_array().shape == (len(kinds), 4)
    assert not any("$" in label.get_text() for label in bar.get_xticklabels() + bar.get_xticklabels(minor=True))
