"""Score layers in one to three passes instead of a sweep. None has replaced masking so far (docs/experiments.md).

    gate             -sum over tokens <f(x) - x, d loss / d f(x)>, x the layer's input, f(x) its output: the first-order estimate of the
                     loss without the layer, nats per supervised token
    cumulative       mean over sequences of sum |theta g| over the layer, divided by the largest layer's
    rank             1 - mean over kinds of module of rank / layers, ranked by cumulative within the kind, the highest having rank 1
    fisher           mean over sequences of sum g^2 over the layer
    block_influence  mean over tokens of 1 - cos(x, f(x)); needs no loss

g is the gradient of one sequence's negative log-likelihood, summed over its supervised tokens, so batching changes nothing.
Source: ADEPT (arXiv 2510.10071), appendix E; block influence: ShortGPT (arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, device_of, hidden_of, last_hidden, replaced_forward, with_hidden
from adept_fast.models.finite import require_finite
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.runtime import distributed
from adept_fast.runtime.progress import Progress
from adept_fast.scoring.scores import ItemScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cheap_scores(model: PreTrainedModel, items: Sequence[Item], method: str, loss: str) -> ItemScores:
    """Score each item by `method`, split over processes. loss: "answer" or "all". Leaves the model as it was."""
    if method != "block_influence" and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{method} needs all weights in memory, and some are offloaded: score by masking or block_influence")
    if loss == "all":
        items = [Item(item.input_ids, item.input_ids) for item in items]
    layers = decoder_layers(model)
    kinds = list(dict.fromkeys(_kind(name) for layer in layers for name, _ in layer.named_parameters()))
    shape = (len(items), len(layers), len(kinds)) if method == "rank" else (len(items), len(layers))
    sums = torch.zeros(shape, dtype=torch.float64)
    parameters = [parameter for layer in layers for parameter in layer.parameters()] if method in ("cumulative", "rank", "fisher") else []
    mine = range(distributed.rank(), len(items), distributed.world_size())
    with only_these_require_grad(model, parameters), Progress(mine, desc=method, unit="item") as bar:
        for index in bar:
            if method == "gate":
                sums[index] = _gate(model, items[index])
            elif method == "block_influence":
                sums[index] = _block_influence(model, items[index])
            else:
                sums[index] = _from_gradients(model, items[index], parameters, method, kinds)
    sums = distributed.total(sums)
    require_finite(model, sums.flatten(1).sum(1), f"the {method} score of item")
    if method == "rank":
        lacking = [[not any(_kind(name) == kind for name, _ in layer.named_parameters()) for kind in kinds] for layer in layers]
        sums[:, torch.tensor(lacking)] = torch.nan
    weights = {"gate": [item.supervised for item in items], "block_influence": [len(item.input_ids) for item in items]}
    return ItemScores(sums, torch.tensor(weights.get(method, [1] * len(items)), dtype=torch.float64))


def _kind(name: str) -> str:
    """Return the module within a layer that a parameter belongs to: "self_attn.q_proj"."""
    return name.rpartition(".")[0]


@contextmanager
def _recorded(model: PreTrainedModel, leaf: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record input and output of each layer in the forwards within. leaf: make the first layer's input require grad."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if leaf and not seen:
                hidden = hidden.detach().requires_grad_()
            output = forward(hidden, *args, **kwargs)
            seen.append((hidden, hidden_of(output)))
            return with_hidden(output, hidden_of(output))

        return run

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(replaced_forward(layer, recording(layer.forward)))
        yield seen


def _gate(model: PreTrainedModel, item: Item) -> Tensor:
    with _recorded(model, leaf=True) as seen:
        loss = batch_loss(model, [item])
    gradients = torch.autograd.grad(loss, [output for _, output in seen])
    terms = [-((output - hidden).double() * gradient.double()).sum() for (hidden, output), gradient in zip(seen, gradients, strict=True)]
    return torch.stack([term.detach().cpu() for term in terms])


@torch.no_grad()
def _block_influence(model: PreTrainedModel, item: Item) -> Tensor:
    with _recorded(model, leaf=False) as seen:
        last_hidden(model, torch.tensor([item.input_ids], device=device_of(model)))
    return torch.stack(
        [(1 - functional.cosine_similarity(hidden.double(), output.double(), dim=-1)).sum().cpu() for hidden, output in seen]
    )


def _from_gradients(model: PreTrainedModel, item: Item, parameters: Sequence[Tensor], method: str, kinds: Sequence[str]) -> Tensor:
    """Sum |theta g| or g^2 over each layer: fp64 [layers], for method "rank" [layers, kinds of module]."""
    gradients = iter(torch.autograd.grad(batch_loss(model, [item]), parameters))
    layers = decoder_layers(model)
    found = torch.zeros(len(layers), len(kinds), dtype=torch.float64)
    for row, layer in zip(found, layers, strict=True):
        for name, parameter in layer.named_parameters():
            gradient = next(gradients)
            value = gradient.square() if method == "fisher" else (parameter.detach() * gradient).abs()
            row[kinds.index(_kind(name))] += value.sum(dtype=torch.float64).cpu()
    return found if method == "rank" else found.sum(1)
