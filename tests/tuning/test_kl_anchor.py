"""The anchor: the base inside the expanded model, bit for bit; its gradient once a step; less drift; the same bits on resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from adept_fast import AdamW, AdeptCallback, Anchor, expand_model, freeze_original
from adept_fast.errors import InputError
from adept_fast.expansion.bypass import bypassed
from adept_fast.models.decoder_layers import head_logits, last_hidden
from adept_fast.tuning.kl_anchor import divergence_from_base
from tests.support import tiny_families, tiny_models
from tests.tuning.test_adept_trainer import arguments, blocks, same, train, weights
from tests.tuning.test_fast_step import batch, expanded


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "bloom", "mamba"])
def test_the_base_is_inside_bit_for_bit(family: str) -> None:
    base = tiny_families.model(family)
    model = expand_model(base, [0, 1])
    ids = batch()["input_ids"] % base.config.get_text_config().vocab_size
    wanted = base(ids).logits
    assert torch.equal(model(ids).logits, wanted)
    with torch.no_grad():
        freeze_original(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    assert not torch.equal(model(ids).logits, wanted)
    for _ in range(2):
        with bypassed(model):
            assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("family", ["gpt2", "biogpt", "xglm", "gemma4_text"])
def test_logits_of_hidden_states_alone_are_the_models_own(family: str) -> None:
    """Of types that read more of their body's output than hidden states."""
    model = tiny_families.model(family)
    ids = batch()["input_ids"] % tiny_families.VOCABULARY
    with torch.no_grad():
        wanted, found = model(ids, use_cache=False).logits.flatten(0, 1), head_logits(model, last_hidden(model, ids).flatten(0, 1))
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_of_a_model_expanded_twice_the_base_is_what_it_was_before_the_last_time() -> None:
    first = expanded().eval()
    second = expand_model(first, [0])
    freeze_original(second)
    with torch.no_grad():
        second.model.layers[1].mlp.down_proj.weight += 0.1
    ids = batch()["input_ids"]
    with bypassed(second):
        assert torch.equal(second(ids).logits, first(ids).logits)


def truth(model: torch.nn.Module, base: torch.nn.Module, items: list) -> torch.Tensor:
    """Mean KL(base || model) in fp64, one item at a time, the base a model of its own."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in items:
        p, q = (m(torch.tensor([item.input_ids])).logits[0].log_softmax(-1) for m in (base, model))
        total, count = total + (p.exp() * (p - q)).sum(), count + len(item.input_ids)
    return total / count


def test_divergence_and_gradient_are_those_of_two_models() -> None:
    base, model, items = tiny_models.model(), expanded(), tiny_models.items(3)
    anchor = Anchor(items, weight=0.7, tokens=10**6)
    kl = anchor.backward(model, 4, scale=8.0)
    assert model.training
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    exact, base = copy.deepcopy(model).double().eval(), base.double()
    exact.zero_grad()
    wanted = truth(exact, base, items)
    (0.7 * 8.0 * wanted).backward()
    assert abs(float(kl) - float(wanted)) <= 1e-5 * float(wanted)
    for name, parameter in exact.named_parameters():
        assert (parameter.grad is None) == (name not in found)
        assert parameter.grad is None or (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_the_items_are_gone_through_in_order_again_and_again() -> None:
    base, model, items = tiny_models.model(), expanded().eval(), tiny_models.items(4, seed=7)
    lengths = [len(item.input_ids) for item in items]
    longest = max(lengths[0] + lengths[1], *lengths[2:])
    groups = [[items[0], items[1]], [items[2]], [items[3]]]
    assert longest < lengths[1] + lengths[2] and longest < lengths[2] + lengths[3]

    def mean(group: list) -> object:
        return pytest.approx(float(truth(model, base, group).detach()), rel=1e-4)

    anchor = Anchor(items, weight=1.0, every=2, tokens=longest)
    assert [step for step in range(9) if anchor.due(step)] == [2, 4, 6, 8]
    for step, group in zip((2, 4, 6, 8), (1, 2, 0, 1), strict=True):
        assert float(anchor.backward(model, step)) == mean(groups[group])
    short = Anchor(items, weight=1.0, every=1, tokens=7)
    cut = [replace(items[1], input_ids=items[1].input_ids[:7], labels=items[1].labels[:7])]
    assert float(short.backward(model, 1)) == mean(cut)


@pytest.mark.slow
def test_it_comes_in_once_a_step_whatever_is_accumulated(tmp_path: Path) -> None:
    """One batch of 4 and 4 of 1 give the same weights, anchored."""
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        model, _, entries = train(
            tmp_path / str(size),
            {"anchor": Anchor(tiny_models.items(4, seed=7), 2.0, every=2, tokens=40)},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        found.append(weights(model))
        kls = [entry["anchor_kl"] for entry in entries if "anchor_kl" in entry]
        assert [entry["step"] for entry in entries if "anchor_kl" in entry] == [3, 5] and min(kls) > 0
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.slow
def test_it_lowers_drift_on_other_text_and_the_domain_is_still_learnt(tmp_path: Path) -> None:
    held = tiny_models.items(4, seed=8)
    drift, losses = {}, {}
    for weight in (0.0, 5.0):
        model, _, entries = train(
            tmp_path / str(weight), {"anchor": Anchor(tiny_models.items(24, seed=7), weight, every=1, tokens=128)}, max_steps=20
        )
        drift[weight] = float(divergence_from_base(model.eval(), held).detach()) / sum(len(item.input_ids) for item in held)
        losses[weight] = [entry["loss"] for entry in entries if entry["event"] == "step"]
    assert drift[5.0] < 0.7 * drift[0.0]
    assert all(each[-1] < each[0] for each in losses.values())


@pytest.mark.slow
def test_weight_zero_changes_nothing_and_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def anchor(weight: float) -> dict:
        return {"anchor": Anchor(tiny_models.items(5, seed=7), weight, every=1, tokens=30)}

    plain, zero = train(tmp_path / "plain", dropout=0.1), train(tmp_path / "zero", anchor(0.0), dropout=0.1)
    assert same(weights(plain[0]), weights(zero[0]))
    whole, _, entries = train(tmp_path / "whole", anchor(1.0), dropout=0.1)
    assert not same(weights(plain[0]), weights(whole))
    train(tmp_path / "cut", anchor(1.0), stop=5, dropout=0.1)
    resumed, _, again = train(tmp_path / "cut", anchor(1.0), resume=str(tmp_path / "cut" / "work" / "checkpoint-4"), dropout=0.1)
    assert same(weights(whole), weights(resumed)) and entries == again


@pytest.mark.slow
def test_any_trainer_takes_it(tmp_path: Path) -> None:
    model = expand_model(tiny_models.model(), [1])
    freeze_original(model)
    anchor = Anchor(tiny_models.items(4), 1.0, every=1)
    callback = AdeptCallback(tiny_models.items(2), anchor=anchor)
    made = Trainer(model, arguments(tmp_path), train_dataset=blocks(), callbacks=[callback], optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2}))
    seen = []
    backward = anchor.backward
    anchor.backward = lambda *args, **kwargs: seen.append(backward(*args, **kwargs)) or seen[-1]
    made.train()
    assert len(seen) == 5 and min(map(float, seen)) > 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="^every must be a whole number of 1 or more, found 0"):
        Anchor(tiny_models.items(1), 1.0, every=0)
    with pytest.raises(InputError, match="^weight must be a number from 0 to 1000, found nan"):
        Anchor(tiny_models.items(1), float("nan"))
    with pytest.raises(InputError, match="items"):
        Anchor([], 1.0)
