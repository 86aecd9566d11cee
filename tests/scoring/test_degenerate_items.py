"""Scores of corpora at the edge of what a corpus may be: those of plain forwards, one item at a time, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.models.losses import batch_loss, corpus_loss
from adept_fast.ops.dispatch import has_native_layers
from adept_fast.scoring import layer_masking, sweep
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.unit_importance import score_units
from adept_fast.scoring.unit_masking import mask_units
from adept_fast.scoring.units import Units
from tests.models.test_cpu_layers import WIDE
from tests.scoring.test_layer_masking import by_hooks
from tests.support import tiny_models
from tests.support.degenerate_batches import ITEMS

SHAPES = {"plain": {}, "native": WIDE, "a head with a scale": {"logits_scaling": 4.0}}


def model_of(shape: str) -> nn.Module:
    return tiny_models.model("granite" if shape == "a head with a scale" else "llama", num_hidden_layers=3, **SHAPES[shape])


def plain_loss(model: nn.Module, item: Item) -> Tensor:
    """Summed over the supervised tokens."""
    logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.double(), torch.tensor(item.labels[1:]), reduction="sum")


def supervised(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.supervised]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ITEMS)
def test_layers(name: str, shape: str) -> None:
    model, items = model_of(shape), ITEMS[name]
    assert sweep.plan(model, supervised(items)).native == (shape == "native" and has_native_layers())
    scores = score_layers(model, items, loss="all", losses=layer_masking.LOSSES, domain=items)
    expected = by_hooks(model, supervised(items))
    for profile, values in expected.items():
        torch.testing.assert_close(torch.tensor(scores.profiles[profile].values), torch.tensor(values), atol=1e-4, rtol=0)
    whole = [Item(item.input_ids, item.input_ids) for item in items if len(item.input_ids) > 1]
    values = torch.tensor(by_hooks(model, whole)["all"])
    torch.testing.assert_close(torch.tensor(scores.profiles["domain"].values), values, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["plain", "native"])
@pytest.mark.parametrize("name", ITEMS)
def test_masked_units(name: str, shape: str) -> None:
    model, items = model_of(shape), supervised(ITEMS[name])
    tokens = sum(item.supervised for item in items)
    found = mask_units(model, ITEMS[name], layers=[1])
    for value, kind in zip(found.values, found.kinds, strict=True):
        before = sum(plain_loss(model, item) for item in items)
        weight = decoder_layers(model)[1].get_submodule(kind).weight
        kept = weight.clone()
        weight.zero_()
        after = sum(plain_loss(model, item) for item in items)
        weight.copy_(kept)
        assert abs(value - float(after - before) / tokens) <= 1e-4, kind


@pytest.mark.parametrize("name", ITEMS)
def test_importance_of_units(name: str) -> None:
    items = supervised(ITEMS[name])
    model = expand_model(model_of("plain"), [1])
    with torch.no_grad():  # copies that are silent no more
        generator = torch.Generator().manual_seed(5)
        for parameter in decoder_layers(model)[2].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    units = Units.of(model)
    found = score_units(model, ITEMS[name], units)
    parameters = {key: model.get_parameter(key).requires_grad_() for key in units.slices}
    gradients = [torch.autograd.grad(plain_loss(model, item), [*parameters.values()]) for item in items]
    tokens = sum(item.supervised for item in items)
    both = zip(parameters.items(), zip(*gradients, strict=True), strict=True)
    values = {key: ((theta * sum(g) / tokens).abs(), sum(x.square() for x in g) / len(items)) for (key, theta), g in both}
    for kind, ours in enumerate((found.abs_taylor, found.fisher)):
        sums = {key: pair[kind].detach().movedim(units.slices[key].dim, 0).flatten(1).sum(1) if pair[kind].ndim > 1 else pair[kind].detach()
                for key, pair in values.items()}  # fmt: skip
        torch.testing.assert_close(ours, units.gather(sums) / units.sizes, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("shape", ["plain", "a head with a scale"])
@pytest.mark.parametrize("name", ITEMS)
def test_losses_of_a_corpus_and_of_a_batch(name: str, shape: str) -> None:
    """Items without a target have a loss of 0; of those without a token there is no position to predict at."""
    model, items = model_of(shape), ITEMS[name]
    expected = [float(plain_loss(model, item).detach()) if item.supervised else 0.0 for item in items]
    for argmax in (False, True):
        found = corpus_loss(model, items, argmax=argmax)
        torch.testing.assert_close(found.sums, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        assert found.tokens.tolist() == [item.supervised for item in items]
        assert not argmax or [len(best) for best in found.argmax] == [len(item.input_ids) for item in items]
    assert float(batch_loss(model, items).detach()) == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_batch_without_a_target_has_a_gradient_of_zero(trained: bool) -> None:
    """In the head, where it is trained, too."""
    model = model_of("plain")
    model.get_output_embeddings().requires_grad_(trained)
    for items in ([Item((5, 6, 7), (5, -100, -100))], [Item((5,), (5,))], [Item((), ())]):
        loss = batch_loss(model, items)
        wanted = [parameter for name, parameter in model.named_parameters() if name.startswith("model.layers")]
        assert float(loss.detach()) == 0
        assert all(gradient is None or not gradient.any() for gradient in torch.autograd.grad(loss, wanted, allow_unused=True))


def test_a_domain_of_single_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="domain: no item of two tokens or more"):
        score_layers(model_of("plain"), tiny_models.items(2), domain=[Item((5,), (5,)), Item((), ())])
