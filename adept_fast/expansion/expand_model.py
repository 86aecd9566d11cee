"""Expand a model in memory: put a copy of each chosen layer right after it, silent until it is trained.

A copy's output projections (weights and biases) are zero. Both its branches then add exactly 0 to the residual stream, and the logits are
the base's, bit for bit in the same dtype and kernel. Source: ADEPT (arXiv 2510.10071), stage 1; LLaMA Pro's identity blocks.
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
from adept_fast.expansion.initialise import initial_values, silent_values
from adept_fast.expansion.settings import Expand
from adept_fast.models.causality import require_causal
from adept_fast.models.decoder_layers import decoder_layers, layer_indices
from adept_fast.models.equal_layers import require_same_layers
from adept_fast.models.layer_config import expanded_config
from adept_fast.models.silent_copies import Family, describe
from adept_fast.models.unwrap import unwrapped
from adept_fast.settings.validation import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    trainable: int


@dataclass(frozen=True)
class Layout:
    """The layers of an expanded model.

    sources: for each layer, the index in the model before this expansion that it is, or is a copy of.
    inserted: all copies, those of earlier expansions too. new: the indices of this expansion's copies.
    """

    sources: tuple[int, ...]
    inserted: tuple[Inserted, ...]
    new: tuple[int, ...]


def place_copies(layers: Iterable[int], count: int, earlier: AdeptConfig | None = None) -> Layout:
    """Lay out a model of `count` layers with a copy of each of `layers`, right after the layer and its earlier copies.

    earlier: the record of a model that is expanded already. Raises InputError for bad indices, and for the index of a copy.
    """
    chosen = layer_indices(layers, count)
    copies = {entry.layer: entry for entry in earlier.inserted} if earlier else {}
    if copied := [layer for layer in chosen if layer in copies]:
        raise InputError(f"layer {copied[0]} is itself a copy (of layer {copied[0] - 1} or an earlier one): copy what it was copied from")
    round = max((entry.round for entry in copies.values()), default=-1) + 1
    sources: list[int] = []
    inserted: list[Inserted] = []
    new: list[int] = []
    original = -1
    for index in range(count):
        if index in copies:
            inserted.append(replace(copies[index], layer=len(sources)))
        else:
            original, group = original + 1, index
        sources.append(index)
        if group in chosen and index + 1 not in copies:
            new.append(len(sources))
            inserted.append(Inserted(len(sources), original, round))
            sources.append(group)
    return Layout(tuple(sources), tuple(inserted), tuple(new))


def expand_model(model: PreTrainedModel, layers: Iterable[int], initialisation: str = Expand.initialisation) -> PreTrainedModel:
    """Return a new model with a silent copy of each chosen layer right after it. Call `freeze_original` on it before training.

    The new model is built from the expanded config, so layer indices, caches and per-layer settings are those of a freshly loaded one.
    It shares the tensors of the original layers with `model`, which stays as it is.

    Args:
        model: a causal language model of transformers.
        layers: the layer indices to copy, each once.
        initialisation: zero_output or zero_gate_up (silent), small_random or scaled_source (for research, not silent); see initialise.py.

    Returns:
        The expanded model, in eval mode. Its `adept_config` records the copies, those of earlier expansions too.

    Raises:
        InputError: an index out of range, given twice, or of a copy; an unknown initialisation.
        UnsupportedFamilyError: the copies cannot be made silent, or the model is not causal.

    >>> expanded = expand_model(model, [0, 2])
    >>> expanded.config.num_hidden_layers, expanded.adept_config.copies
    (6, (1, 4))
    """
    check(Expand, initialisation=initialisation)
    model = unwrapped(model)
    family, earlier = describe(model), AdeptConfig.of(model)
    require_causal(model)
    count = len(family.silent)
    layout = place_copies(layers, count, earlier)
    expanded = _build(model, [layout.sources[index] for index in layout.new])
    require_same_layers(model, expanded, layout.sources)
    after = decoder_layers(expanded)
    _fill(expanded, model, after, layout)
    for index in layout.new:
        _initialise(after[index], family, layout.sources[index], initialisation, index)
    total = sum(parameter.numel() for parameter in expanded.parameters())
    trainable = sum(parameter.numel() for index in layout.new for parameter in after[index].parameters())
    source = earlier.source if earlier else {"name_or_path": model.config.name_or_path, "identity": "", "num_hidden_layers": count}
    record = AdeptConfig(
        inserted=layout.inserted,
        source=source,
        parameters={"total": total, "trainable": trainable},
        versions=versions(),
        initialisation=initialisation,
    )
    setattr(expanded, KEY, record)
    setattr(expanded.config, KEY, record.as_dict())
    return expanded.eval()


def _build(model: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """Build a model of the expanded config: parameters on meta, buffers and plain attributes as its constructor computes them."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        built = type(model)(expanded_config(model.config, chosen))
    built.generation_config = copy.deepcopy(model.generation_config)
    return built


def _fill(expanded: PreTrainedModel, model: PreTrainedModel, after: nn.ModuleList, layout: Layout) -> None:
    """Share the tensors of `model` with `expanded`; the new copies get clones."""
    before = decoder_layers(model)
    pairs = [(after[index], before[source]) for index, source in enumerate(layout.sources)]
    for index, (layer, source) in enumerate(pairs):
        for name, module in layer.named_modules():
            _take(module, source.get_submodule(name), index in layout.new)
    inner = {id(module) for layer, _ in pairs for module in layer.modules()}
    for name, module in expanded.named_modules():
        if id(module) not in inner:
            _take(module, model.get_submodule(name), copied=False)


def _take(module: nn.Module, source: nn.Module, copied: bool) -> None:
    for name, tensor in source._parameters.items():
        module._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad) if copied and tensor is not None else tensor
    for name, buffer in source._buffers.items():
        module._buffers[name] = buffer.clone() if copied and buffer is not None else buffer


def _initialise(layer: nn.Module, family: Family, source: int, how: str, index: int) -> None:
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with torch.no_grad():
        for name, value in silent_values(family, source, tensors, how).items():
            if not tensors[name].is_meta:
                tensors[name].copy_(initial_values(tensors[name], value, how, f"{index}.{name}"))


def copies(model: PreTrainedModel) -> list[nn.Module]:
    """Return the copies of the last expansion, the ones that are trained, in order."""
    layers = decoder_layers(model)
    return [layers[index] for index in record_of(model).trained]


def freeze_original(model: PreTrainedModel) -> ParameterCounts:
    """Let only the copies of the last expansion require gradients.

    Args:
        model: an expanded model; it is changed in place.

    Returns:
        The numbers of parameters, `total` and `trainable`.

    Raises:
        InputError: the model has no copies.

    >>> freeze_original(expand_model(model, [1]))
    ParameterCounts(total=57952, trainable=7744)
    """
    model = unwrapped(model)
    record_of(model)
    model.requires_grad_(False)
    trainable = 0
    for layer in copies(model):
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
            trainable += parameter.numel()
    return ParameterCounts(sum(parameter.numel() for parameter in model.parameters()), trainable)
