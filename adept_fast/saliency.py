"""Importance of parameters and units for a corpus, from gradients.

    abs_taylor   |theta * g|, g the gradient of the token-weighted mean loss over the whole corpus (so it does not depend on batching)
    fisher       E[g^2], g the gradient of one sequence's negative log-likelihood (the sum over its supervised tokens)

Source: ADEPT (arXiv 2510.10071), section on unit importance; its first-order Taylor score with the absolute value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adept_fast import backend, reference
from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.families import device_of
from adept_fast.losses import sequence_loss
from adept_fast.units import Units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sums:
    """Sums over all dimensions but one: fp32 [parameter.shape[dim]] each."""

    abs_taylor: Tensor
    fisher: Tensor


@dataclass(frozen=True)
class UnitImportance:
    """abs_taylor: mean |theta * g| per unit, fp64 [units], nats per token; fisher: mean E[g^2] per unit, fp64 [units]."""

    units: Units
    abs_taylor: Tensor
    fisher: Tensor


def saliency_sums(parameter: Tensor, gradient: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """sum g^2, sum |theta g| and sum theta g for each index of `dim`, fp32 [parameter.shape[dim]], by the backend that fits the device."""
    if backend.resolve("saliency", parameter.device) == "triton":
        from adept_fast.kernels import saliency

        return saliency.saliency_sums(parameter, gradient, dim)
    return reference.saliency_sums(parameter, gradient, dim)


@contextmanager
def _only_these_require_grad(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """For the time being, in eval mode and with the RNG forked, so that nothing of a training run is touched."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, mode in modes:  # transformers checkpoints activations in training mode only; a layer's own flag switches no dropout on
        if getattr(module, "gradient_checkpointing", False):
            module.training = mode
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.random.fork_rng(devices=[device_of(model)] if device_of(model).type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for module, mode in modes:
            module.training = mode


def parameter_sums(
    model: PreTrainedModel, items: Sequence[Item], dims: Mapping[str, Sequence[int]], title: str = "importance", quiet: bool | None = None
) -> dict[tuple[str, int], Sums]:
    """Sums of the named parameters along the given dimensions: (name, dim) -> Sums. Leaves .grad, RNG and training mode as they were."""
    items = [item for item in items if item.supervised]
    if not items:
        raise InputError("no supervised token to take gradients from: give items with text, or with instruction and output")
    names = list(dims)
    parameters = [model.get_parameter(name) for name in names]
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    fisher: dict[tuple[str, int], Tensor] = {}
    with _only_these_require_grad(model, parameters):
        for item in tqdm(items, desc=title, unit="item", disable=quiet):
            gradients = torch.autograd.grad(sequence_loss(model, item), parameters)
            for name, parameter, gradient, running in zip(names, parameters, gradients, total, strict=True):
                running += gradient
                for dim in dims[name]:
                    squares = saliency_sums(parameter.detach(), gradient, dim)[0]
                    fisher[name, dim] = fisher[name, dim] + squares if (name, dim) in fisher else squares
    tokens = sum(item.supervised for item in items)
    sums = {}
    for name, parameter, running in zip(names, parameters, total, strict=True):
        for dim in dims[name]:
            abs_taylor = saliency_sums(parameter.detach(), running / tokens, dim)[1]
            sums[name, dim] = Sums(abs_taylor.cpu(), (fisher[name, dim] / len(items)).cpu())
    return sums


def unit_importance(units: Units, sums: Mapping[tuple[str, int], Sums]) -> UnitImportance:
    """Means over units of per-index sums of their parameters."""
    picked = {name: sums[name, cut.dim] for name, cut in units.slices.items()}
    abs_taylor = units.gather({name: entry.abs_taylor for name, entry in picked.items()}) / units.sizes
    fisher = units.gather({name: entry.fisher for name, entry in picked.items()}) / units.sizes
    return UnitImportance(units, abs_taylor, fisher)


def score_units(
    model: PreTrainedModel,
    probe: str | Source | Iterable[Mapping[str, Any] | Item],
    units: Units,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool | None = None,
) -> UnitImportance:
    """Importance of each unit of an expanded model for the probe. In a copy that is still silent all |theta g| are 0: see
    `adept_fast.expansion.first_importance` for the first rates. Raises InputError for a probe with nothing supervised."""
    dims = {name: (cut.dim,) for name, cut in units.slices.items()}
    return unit_importance(units, parameter_sums(model, load_items(probe, tokenizer), dims, "unit importance", quiet))
