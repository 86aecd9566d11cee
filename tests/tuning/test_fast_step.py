"""The fast step: transformers' loss and gradients without logits, nothing kept and nothing run below the lowest copy."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.tuning.fast_step import fast_step
from tests.support import tiny_models
from tests.support.degenerate_batches import BATCHES, targets


def expanded(family: str = "llama", layers: tuple[int, ...] = (1, 2), **changes: object) -> nn.Module:
    model = expand_model(tiny_models.model(family, **changes), layers)
    freeze_original(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # copies that are silent no more
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.train()


def batch(rows: int = 2, length: int = 23) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, tiny_models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.arange(length) % 5 == 0, -100, ids)
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, fast: bool, **inputs: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    if fast:
        with fast_step(model) as active:
            assert active
            output = model(**inputs)
        assert output.logits is None
    else:
        output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("recurrent_gemma", {"logits_soft_cap": 3.0, "lru_width": 32, "num_hidden_layers": 3}),
        ("xlstm", {"output_logit_soft_cap": 3.0, "hidden_size": 64, "num_heads": 2, "num_blocks": 4}),
    ],
)
def test_loss_and_gradients_are_as_near_to_the_truth_as_the_models_own(family: str, changes: dict, items: object) -> None:
    model = expanded(family, **changes)
    inputs = {**batch(), "use_cache": False, **({} if items is None else {"num_items_in_batch": items})}  # xlstm's backward takes no cache
    ours, own = gradients(model, True, **inputs), gradients(model, False, **inputs)
    loss, truth = gradients(model.double(), False, **inputs)
    assert (ours[0] - loss).abs() <= (own[0] - loss).abs() + 1e-6 * loss
    for name, exact in truth.items():
        error, reference = ((found[1][name] - exact).norm() for found in (ours, own))
        assert error <= 1.5 * reference + 1e-6 * exact.norm(), name


COUNTS = (None, 0, torch.tensor(0.0), torch.tensor(3.5))  # 0 where no micro-batch of a step has a target


@pytest.mark.parametrize(
    ("name", "items"), [(name, items) for name in BATCHES for items in COUNTS if items is None or items > 0 or not targets(BATCHES[name])]
)
def test_degenerate_batches(name: str, items: object) -> None:
    """transformers' own loss and gradients, but 0 for its 0 / 0; its gradients are 0 there already."""
    batch = BATCHES[name]
    model = expanded()
    inputs = {**batch, "use_cache": False, **({} if items is None else {"num_items_in_batch": items})}
    (ours, found), (theirs, expected) = (gradients(model, fast, **inputs) for fast in (True, False))
    if not targets(batch):
        assert float(ours) == 0 and not theirs.nan_to_num().any()
        assert all(gradient.eq(0).all() for each in (found, expected) for gradient in each.values())
    torch.testing.assert_close(ours, theirs.nan_to_num(), rtol=1e-5, atol=0)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_a_batch_of_no_rows_is_refused_as_by_the_model() -> None:
    model, none = expanded(), {key: value[:0] for key, value in batch().items()}
    for fast in (True, False):
        with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
            gradients(model, fast, **none)


def test_labels_in_one_row_or_to_be_ignored_by_another_number() -> None:
    """What transformers' own loss takes beside labels as they come from a collator."""
    model, plain = expanded(), batch()
    shifted = nn.functional.pad(plain["labels"], (0, 1), value=-100)[..., 1:]
    ignoring = {**plain, "labels": plain["labels"].masked_fill(plain["labels"] == -100, 0), "ignore_index": 0}
    for inputs in ({"input_ids": plain["input_ids"], "shift_labels": shifted.flatten(), "labels": plain["labels"]}, ignoring):
        with fast_step(model) as active:
            ours = model(**inputs).loss
        assert active
        torch.testing.assert_close(ours, model(**inputs).loss, rtol=1e-5, atol=0)


def test_a_family_whose_base_model_is_itself() -> None:
    model = expanded("llama4_text", num_local_experts=4, head_dim=8, intermediate_size_mlp=48)
    ours, own = (gradients(model, fast, **batch()) for fast in (True, False))
    torch.testing.assert_close(ours[0], own[0], rtol=1e-6, atol=0)
    for name, gradient in own[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name



class Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextmanager
def watched(layers: nn.ModuleList) -> Iterator[tuple[list[weakref.WeakSet[Kept]], list[int]]]:
    """What the forward of each layer keeps for backward, for as long as it is kept, and the layers that backward runs through."""
    kept, run, at, handles = [weakref.WeakSet() for _ in layers], [], [-1], []

    def pack(tensor: torch.Tensor) -> Kept:
        packed = Kept(tensor)
        if at[0] >= 0:
            kept[at[0]].add(packed)
        return packed

    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: at.__setitem__(0, index)))
        handles.append(layer.register_forward_hook(lambda *_: at.__setitem__(0, -1)))
        handles.append(layer.mlp.register_full_backward_hook(lambda *_, index=index: run.append(index)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        yield kept, run
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inputs_require_grad", [False, True])
def test_nothing_below_the_lowest_copy_keeps_or_runs_anything(checkpointing: bool, inputs_require_grad: bool) -> None:
    model = expanded()
    plain = gradients(model, False, **batch())[1]
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if inputs_require_grad:
        model.enable_input_require_grads()
    with fast_step(model), watched(decoder_layers(model)) as (kept, run):
        loss = model(**batch()).loss
        gc.collect()  # torch.utils.checkpoint leaves cycles
        alive = [len(layer) for layer in kept]
        loss.backward()
    assert alive[:2] == [0, 0] and min(alive[2:]) > 0 and set(run) == {2, 3, 4, 5}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in plain), name
        assert parameter.grad is None or (parameter.grad - plain[name]).norm() <= 1e-5 * plain[name].norm(), name


def test_what_cannot_be_fast_goes_the_models_own_way() -> None:
    model = expanded()
    with fast_step(model):
        assert model(batch()["input_ids"]).logits.shape[-1] == tiny_models.VOCABULARY
        assert model.eval()(**batch()).logits is not None
        assert isinstance(model.train()(**batch(), return_dict=False), tuple)
        with fast_step(model.train()) as again:
            assert again and model(**batch()).logits is None
        assert model(**batch()).logits is None
    assert "forward" not in vars(model) and model(**batch()).logits is not None
    model.get_output_embeddings().weight.requires_grad_(True)
    with fast_step(model) as active:
        assert not active and model(**batch()).logits is not None
    model = expanded("mixtral", output_router_logits=True)
    with fast_step(model) as active:
        assert not active


def test_wrappers_put_on_inside_are_left_on() -> None:
    model = expanded()
    with fast_step(model):
        inner = model.forward
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        assert model(**batch()).logits is None
    assert model(**batch()).logits is not None


@pytest.mark.slow
def test_compiles() -> None:
    model = expanded()
    plain, _ = gradients(model, False, **batch())
    with fast_step(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss = compiled(**batch()).loss
        loss.backward()
    assert (loss - plain).abs() <= 1e-6 * plain
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
