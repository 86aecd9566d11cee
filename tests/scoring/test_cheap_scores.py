"""Cheap layer scores against their definitions in fp64, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring.score_layers import score_layers
from tests.support import tiny_models


def loss_of(model: torch.nn.Module, item: object, reduction: str = "sum") -> torch.Tensor:
    logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(item.labels[1:]), reduction=reduction)


@pytest.fixture(scope="module")
def truth() -> tuple:
    # LayerNorm stays in fp64; the RMSNorm of other families rounds to fp32 inside
    model, items = tiny_models.model("gpt_neox", dtype=torch.float64), tiny_models.items(5)
    layers = decoder_layers(model)
    gradients = []
    for item in items:
        model.zero_grad()
        loss_of(model, item).backward()
        gradients.append([{name: parameter.grad.clone() for name, parameter in layer.named_parameters()} for layer in layers])
    model.zero_grad()
    return model, items, gradients


def scored(truth: tuple, method: str, **options: object) -> torch.Tensor:
    return torch.tensor(score_layers(truth[0], truth[1], method, **options).values, dtype=torch.float64)


def test_gate_is_the_slope_at_an_open_gate(truth: tuple) -> None:
    """d loss / d g for output x + g (f(x) - x) at g = 1, by central differences, with the sign of removing the layer."""
    model, items, _ = truth
    step, found = 1e-4, []
    for layer in decoder_layers(model):
        losses = []
        for gate in (1 + step, 1 - step):
            handle = layer.register_forward_hook(lambda _, args, output, gate=gate: args[0] + gate * (output - args[0]))
            with torch.no_grad():
                losses.append(sum(float(loss_of(model, item)) for item in items))
            handle.remove()
        found.append(-(losses[0] - losses[1]) / (2 * step) / sum(item.supervised for item in items))
    torch.testing.assert_close(scored(truth, "gate"), torch.tensor(found, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_fisher_cumulative_and_rank_are_per_sequence(truth: tuple) -> None:
    model, items, gradients = truth
    layers = decoder_layers(model)
    fisher = [sum(float(g.square().sum()) for item in gradients for g in item[layer].values()) / len(items) for layer in range(4)]
    torch.testing.assert_close(scored(truth, "fisher"), torch.tensor(fisher, dtype=torch.float64), rtol=1e-5, atol=0)
    by_module: list[dict[str, float]] = []
    for layer in range(4):
        kinds: dict[str, float] = {}
        for name, parameter in layers[layer].named_parameters():
            value = sum(float((parameter.detach() * item[layer][name]).abs().sum()) for item in gradients)
            kind = name.rpartition(".")[0]
            kinds[kind] = kinds.get(kind, 0.0) + value
        by_module.append(kinds)
    totals = torch.tensor([sum(kinds.values()) for kinds in by_module], dtype=torch.float64)
    torch.testing.assert_close(scored(truth, "cumulative"), totals / totals.max(), rtol=1e-5, atol=0)
    ranks = [sum(1 + sum(other[kind] > own for other in by_module) for kind, own in kinds.items()) / len(kinds) for kinds in by_module]
    torch.testing.assert_close(scored(truth, "rank"), 1 - torch.tensor(ranks, dtype=torch.float64) / 4)


def test_block_influence_is_one_minus_the_cosine(truth: tuple) -> None:
    model, items, _ = truth
    found, tokens = torch.zeros(4, dtype=torch.float64), 0
    for item in items:
        stream: list = []

        def keep(_: object, args: tuple, output: torch.Tensor, stream: list = stream) -> None:
            stream.append((args[0], output))

        handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
        with torch.no_grad():
            model(torch.tensor([item.input_ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        found += torch.stack([(1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum() for x, y in stream])
        tokens += len(item.input_ids)
    torch.testing.assert_close(scored(truth, "block_influence"), found / tokens)


def test_model_is_left_as_it_was_and_kl_is_refused(truth: tuple) -> None:
    model, items, _ = truth
    model.train()
    score_layers(model, items, "fisher", "all")
    assert model.training and all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model.eval()
    with pytest.raises(InputError, match="no profile by kl"):
        score_layers(model, items, "gate", "kl")
