"""Compute what copies cost as shares of full continual pretraining (CPT), and choose as many layers as a budget allows.

    parameters = sum over copies of p_l / P                 p_l parameters of layer l, P of the whole model
    time       = (F + B) / (3 (sum w_l + h))                full CPT: forward, backward to activations, backward to weights
             F = sum over layers and copies of w_l + h      forward
             B = h + sum over layers above the lowest copied of w_l + 2 sum over copies of w_l

w_l counts the weights of the matrices of layer l, h those of the head. A model that has copies already counts as it is. The time is a
model, not a measurement: it leaves out attention products, element-wise work and the optimizer step, of which copies save most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring.settings import Budget
from adept_fast.settings.validation import check, prefixed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerCosts:
    """Sizes from which the costs of copies follow.

    parameters, weights: of each layer, in all and in its matrices
    total: parameters of the model
    head: weights of its head
    """

    parameters: tuple[int, ...]
    weights: tuple[int, ...]
    total: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> LayerCosts:
        """Count the sizes of a model. Meta tensors are enough."""
        layers = decoder_layers(model)
        head = model.get_output_embeddings()
        return cls(
            tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
            tuple(sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1) for layer in layers),
            sum(parameter.numel() for parameter in model.parameters()),
            0 if head is None else head.weight.numel(),
        )

    def shares(self, layers: Sequence[int]) -> dict[str, float]:
        """Return the shares of full CPT that copies of `layers` take: {"parameters": ..., "time": ...}."""
        copies = sum(self.weights[layer] for layer in layers)
        forward = sum(self.weights) + copies + self.head
        backward = self.head + sum(self.weights[min(layers) + 1 :]) + 2 * copies if layers else 0
        parameters = sum(self.parameters[layer] for layer in layers) / self.total
        return {"parameters": parameters, "time": (forward + backward) / (3 * (sum(self.weights) + self.head))}


def check_budget(budget: Mapping[str, float], costs: LayerCosts, candidates: Sequence[int]) -> None:
    """Raise InputError for a malformed budget, and for one that no single layer of `candidates` fits."""
    known = [entry.name for entry in fields(Budget)]
    if not budget or not set(known).issuperset(budget):
        raise InputError(f"budget takes {' and '.join(known)}, shares of full training, found {dict(budget)}", "budget")
    with prefixed("budget."):
        check(Budget, needed=True, **budget)
    for name, share in budget.items():
        if share < (least := min(costs.shares([layer])[name] for layer in candidates)):
            found = f"budget.{name}={share:g}"
            raise InputError(f"{found} allows no copy: that of one layer takes {least:.4g} of full training", f"budget.{name}")


def within(budget: Mapping[str, float], costs: LayerCosts, choices: Sequence[list[int]]) -> list[int]:
    """Return the last of `choices` whose shares are all within the budget. Raises InputError if none is."""
    fitting = [layers for layers in choices if all(costs.shares(layers)[name] <= share for name, share in budget.items())]
    if not fitting:
        cheapest = {name: round(min(costs.shares(layers)[name] for layers in choices), 4) for name in budget}
        raise InputError(f"budget {dict(budget)} allows no copy: the cheapest choice takes {cheapest} of full training", "budget")
    return fitting[-1]
