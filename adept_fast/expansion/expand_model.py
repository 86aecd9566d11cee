"""Expansion in memory: chosen layers are duplicated right after themselves by copies that are silent at first.

A copy's output projections (weights and biases) are zero, so both its branches add exactly 0 and the expanded model computes what the
base computes, bit for bit in the same dtype and kernel. Source: ADEPT (arXiv 2510.10071), stage 1; LLaMA Pro's identity blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from adept_fast.checkpoints.adept_config import KEY, AdeptConfig, Inserted, record_of, versions
from adept_fast.errors import InputError
from adept_fast.expansion.initialise import fills, initial
from adept_fast.expansion.settings import Expand
from adept_fast.models import (
    Family,
    decoder_layers,
    describe,
    expanded_config,
    layer_indices,
    layers_path,
    require_causal,
    same_layers,
    unwrapped,
)
from adept_fast.settings.validation import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    trainable: int


@dataclass(frozen=True)
class Arrangement:
    """sources: for each layer of the expanded model, the layer of the given one that it is or copies; inserted: all its copies, those of
    earlier expansions too; new: the indices of the new ones."""

    sources: tuple[int, ...]
    inserted: tuple[Inserted, ...]
    new: tuple[int, ...]


def arrange_copies(layers: Iterable[int], count: int, earlier: AdeptConfig | None = None) -> Arrangement:
    """Where the layers of a model of `count` layers stand when each of `layers` is copied; earlier: its record, if it is expanded already.

    A new copy comes right after its layer and that layer's earlier copies. Raises InputError for bad indices, or a copy's.
    """
    chosen = layer_indices(layers, count)
    held = {entry.layer: entry for entry in earlier.inserted} if earlier else {}
    if copied := [layer for layer in chosen if layer in held]:
        raise InputError(f"layer {copied[0]} is itself a copy (of layer {copied[0] - 1} or an earlier one): copy what it was copied from")
    round = max((entry.round for entry in held.values()), default=-1) + 1
    sources: list[int] = []
    inserted: list[Inserted] = []
    new: list[int] = []
    original = -1
    for index in range(count):
        if index in held:
            inserted.append(replace(held[index], layer=len(sources)))
        else:
            original, group = original + 1, index
        sources.append(index)
        if group in chosen and index + 1 not in held:
            new.append(len(sources))
            inserted.append(Inserted(len(sources), original, round))
            sources.append(group)
    return Arrangement(tuple(sources), tuple(inserted), tuple(new))


def expand_model(model: PreTrainedModel, layers: Iterable[int], initialisation: str = Expand.initialisation) -> PreTrainedModel:
    """A new model with a silent copy of each chosen layer right after it; `model` stays as it is.

    The model is built from the expanded config, so that indices, caches and per-layer settings are those of a freshly loaded one.
    Tensors of the original layers are shared with `model`, not copied. `adept_config` of the result names the copies, those of earlier
    expansions too; call freeze_original before training. initialisation: see initialise.py; all but zero_output and zero_gate_up give
    copies that are not silent. Raises UnsupportedFamilyError for a family whose copies cannot be made silent, or that reads ahead.
    """
    check(Expand, initialisation=initialisation)
    model = unwrapped(model)
    family, earlier = describe(model), AdeptConfig.of(model)
    require_causal(model)
    count = len(family.silent)
    made = arrange_copies(layers, count, earlier)
    expanded = _built(model, [made.sources[index] for index in made.new])
    same_layers(model, expanded, made.sources)
    _fill(expanded, model, family.layers, made)
    after = decoder_layers(expanded)
    for index in made.new:
        _initialise(after[index], family, made.sources[index], initialisation, index)
    total = sum(parameter.numel() for parameter in expanded.parameters())
    trainable = sum(parameter.numel() for index in made.new for parameter in after[index].parameters())
    source = earlier.source if earlier else {"name_or_path": model.config.name_or_path, "identity": "", "num_hidden_layers": count}
    expanded.adept_config = AdeptConfig(
        inserted=made.inserted,
        source=source,
        parameters={"total": total, "trainable": trainable},
        versions=versions(),
        initialisation=initialisation,
    )
    setattr(expanded.config, KEY, expanded.adept_config.as_dict())
    return expanded.eval()


def _built(model: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """A model of the expanded config: parameters on meta, buffers and plain attributes as its constructor computes them."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        built = type(model)(expanded_config(model.config, chosen))
    built.generation_config = copy.deepcopy(model.generation_config)
    return built


def _fill(expanded: PreTrainedModel, model: PreTrainedModel, path: str, made: Arrangement) -> None:
    """Put the tensors of `model` in their places in `expanded`; the new copies get their own."""
    before, after = model.get_submodule(path), expanded.get_submodule(path)
    pairs = [(after[index], before[source]) for index, source in enumerate(made.sources)]
    for index, (layer, source) in enumerate(pairs):
        for name, module in layer.named_modules():
            _take(module, source.get_submodule(name), index in made.new)
    inner = {id(module) for layer, _ in pairs for module in layer.modules()}
    for name, module in expanded.named_modules():
        if id(module) not in inner:
            _take(module, model.get_submodule(name), copied=False)


def _take(module: nn.Module, source: nn.Module, copied: bool) -> None:
    for name, tensor in source._parameters.items():
        module._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad) if copied and tensor is not None else tensor
    for name, tensor in source._buffers.items():
        module._buffers[name] = tensor.clone() if copied and tensor is not None else tensor


def _initialise(layer: nn.Module, family: Family, source: int, how: str, index: int) -> None:
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with torch.no_grad():
        for name, value in fills(family, source, tensors, how).items():
            if not tensors[name].is_meta:
                tensors[name].copy_(initial(tensors[name], value, how, f"{index}.{name}"))


def copies(model: PreTrainedModel) -> list[nn.Module]:
    """The copied layers of an expanded model that are to be trained, in order: those of its last expansion."""
    layers = model.get_submodule(layers_path(model))
    return [layers[index] for index in record_of(model).trained]


def freeze_original(model: PreTrainedModel) -> ParameterCounts:
    """Let only the copies of the last expansion require gradients. Returns total and trainable parameter counts."""
    model = unwrapped(model)
    record_of(model)
    model.requires_grad_(False)
    trainable = 0
    for layer in copies(model):
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
            trainable += parameter.numel()
    return ParameterCounts(sum(parameter.numel() for parameter in model.parameters()), trainable)
