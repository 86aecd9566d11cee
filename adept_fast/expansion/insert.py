"""Expansion in memory: chosen layers are duplicated right after themselves by copies that are silent at first.

A copy's output projections (weights and biases) are zero, so both its branches add exactly 0 and the expanded model computes what the
base computes, bit for bit in the same dtype and kernel. Source: ADEPT (arXiv 2510.10071), stage 1; LLaMA Pro's identity blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from adept_fast.errors import InputError
from adept_fast.families import describe, expanded_config, layers_path
from adept_fast.record import AdeptConfig, Inserted, record_of, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    trainable: int


def check_layers(layers: Iterable[int], count: int) -> list[int]:
    """The chosen layers, ascending. Raises InputError for an index outside the model, a repeated one, or none."""
    chosen = list(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise InputError(f"layers must be indices from 0 to {count - 1}, found {layer!r}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise InputError(f"layers must name one layer at least, each once, found {chosen}")
    return sorted(chosen)


def expand_model(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A new model with a silent copy of each chosen layer right after it; `model` stays as it is.

    Tensors of the original layers are shared with `model`, not copied. `adept_config` of the result names the copies; call
    freeze_original before training. Raises UnsupportedFamilyError for a family whose copies cannot be made silent.
    """
    if getattr(model, "adept_config", None) is not None:
        raise InputError("this model is expanded already: expanding twice is not supported; start from its base")
    family = describe(model)
    count = len(model.get_submodule(family.layers))
    chosen = check_layers(layers, count)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    expanded = copy.deepcopy(model, memo=shared)
    parent, _, name = family.layers.rpartition(".")
    before = expanded.get_submodule(family.layers)
    after: list[nn.Module] = []
    inserted: list[Inserted] = []
    for index, layer in enumerate(before):
        after.append(layer)
        if index in chosen:
            inserted.append(Inserted(layer=len(after), copied_from=index))
            after.append(_silent_copy(layer, family.silent[index]))
    setattr(expanded.get_submodule(parent), name, nn.ModuleList(after))
    for index, layer in enumerate(after):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    vars(expanded.config).update(vars(expanded_config(model.config, chosen)))
    total = sum(parameter.numel() for parameter in expanded.parameters())
    trainable = sum(parameter.numel() for entry in inserted for parameter in after[entry.layer].parameters())
    expanded.adept_config = AdeptConfig(
        inserted=tuple(inserted),
        source={"name_or_path": model.config.name_or_path, "sha256": "", "num_hidden_layers": count},
        parameters={"total": total, "trainable": trainable},
        versions=versions(),
    )
    return expanded.eval()


def _silent_copy(layer: nn.Module, silent: Mapping[str, float]) -> nn.Module:
    duplicate = copy.deepcopy(layer, memo={})  # without the memo of shared tensors: the copy has its own
    tensors = dict(duplicate.named_parameters()) | dict(duplicate.named_buffers())
    with torch.no_grad():
        for name, value in silent.items():
            tensors[name].fill_(value)
    return duplicate


def copies(model: PreTrainedModel) -> list[nn.Module]:
    """The copied layers of an expanded model, in order."""
    layers = model.get_submodule(layers_path(model))
    return [layers[index] for index in record_of(model).copies]


def freeze_original(model: PreTrainedModel) -> ParameterCounts:
    """Let only the copies require gradients. Returns total and trainable parameter counts."""
    model.requires_grad_(False)
    trainable = 0
    for layer in copies(model):
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
            trainable += parameter.numel()
    return ParameterCounts(sum(parameter.numel() for parameter in model.parameters()), trainable)
