"""Make the config of an expanded model: rewrite the layer count and every per-layer field.

Fields are listed by meaning, because a list of layer indices and a list with one entry per layer can have the same length.
`require_same_layers` compares the layers that both configs build, and so finds a field that matters and is missing here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adept_fast.errors import UnsupportedFamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ONE_A_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers"),
    *("layer_rope_theta", "num_attention_heads_per_layer"),
)
INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")  # numbers of first layers
LAST_INDEX = ("moe_layer_end_index",)
COUNTS = ("num_hidden_layers", "num_blocks")
OVERRIDES = "per_layer_config"  # {"3": {field: value}}, a property in transformers


class _Positions:
    """The new indices of a model's `count` layers, once each of `layers` is followed by its copy."""

    def __init__(self, layers: Sequence[int], count: int) -> None:
        self.layers, self.count = frozenset(layers), count

    def of(self, index: int) -> list[int]:
        """Return the new indices of a layer and, if it has one, of its copy."""
        own = index + sum(layer < index for layer in self.layers)
        return [own, own + 1] if index in self.layers else [own]

    def one_a_layer(self, values: Sequence[Any]) -> list[Any]:
        return [value for index, value in enumerate(values) for _ in self.of(index)]

    def indices(self, values: Sequence[int]) -> list[int]:
        return [new for index in values for new in self.of(index)]

    def first_layers(self, number: int) -> int:
        return number + sum(layer < number for layer in self.layers)

    def last_index(self, index: int) -> int:
        return index if index < 0 else self.of(min(index, self.count - 1))[-1]

    def overrides(self, values: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
        return {new: value for key, value in values.items() for new in self.of(int(key))}


def expanded_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return a copy of `config`, also a multimodal one, for the model with a copy right after each of `layers`.

    layers: distinct indices in the unexpanded model
    """
    expanded = copy.deepcopy(config)
    text = expanded.get_text_config(decoder=True)
    count = text.num_hidden_layers
    at = _Positions(layers, count)
    changes: dict[str, Any] = {}
    rewritten: tuple[tuple[Sequence[str], Callable[[Any], Any], type], ...] = (
        (ONE_A_LAYER, at.one_a_layer, list),
        (INDICES, at.indices, list),
        (FIRST_LAYERS, at.first_layers, int),
        (LAST_INDEX, at.last_index, int),
    )
    for keys, change, kind in rewritten:
        changes |= {key: change(value) for key in keys if isinstance(value := vars(text).get(key), kind)}
    for key, rewrite in REWRITTEN.items():
        if vars(text).get(key) is not None:
            changes |= rewrite(text, at)
    overrides = text.to_dict().get(OVERRIDES)
    vars(text).update(changes)
    for key in COUNTS:
        if getattr(text, key, None) == count:
            setattr(text, key, count + len(at.layers))
    if overrides:
        text.per_layer_config = at.overrides(overrides)
    return expanded


def broken_periods(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    """Return a sentence for each per-layer field that is periodic in `before` but not in `after`."""
    old, new = (vars(config.get_text_config(decoder=True)) for config in (before, after))
    found = {key: period for key in ONE_A_LAYER if isinstance(old.get(key), list) and (period := _period(old[key])) > 1}
    return [
        f"{key} repeated every {period} layers and no longer does: config.json lists it layer by layer, but an engine that counts layers "
        "modulo a period instead (llama.cpp for Gemma-like models, say) computes something else: compare its tokens before use"
        for key, period in found.items()
        if any(value != new[key][index % period] for index, value in enumerate(new[key]))
    ]


def _period(values: Sequence[Any]) -> int:
    """Return the period of `values`, which must repeat at least once; 0 without a period, 1 if all are equal."""
    periods = range(1, len(values) // 2 + 1)
    return next((period for period in periods if all(value == values[at % period] for at, value in enumerate(values))), 0)


def _indexers(text: PretrainedConfig, at: _Positions) -> dict[str, Any]:
    """Refuse to copy a "full" layer that selects tokens for the "shared" layer after it: the copy would select others."""
    types = text.indexer_types
    for layer in at.layers:
        if types[layer : layer + 2] == ["full", "shared"]:
            raise UnsupportedFamilyError(
                f"{text.model_type}: cannot be expanded: layer {layer} picks the tokens that layer {layer + 1} attends to: "
                "copy another layer"
            )
    return {"indexer_types": at.one_a_layer(types)}


def _sparse_step(text: PretrainedConfig, at: _Positions) -> dict[str, Any]:
    """Replace "every n-th layer is sparse" by a list of the dense layers."""
    step = text.decoder_sparse_step
    dense = [index for index in range(at.count) if index in text.mlp_only_layers or (index + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": at.indices(dense)}


def _cyclic_types(text: PretrainedConfig, at: _Positions) -> dict[str, Any]:
    """Replace a repeated pattern by one entry per layer."""
    return {"block_types": at.one_a_layer([text.block_types[index % len(text.block_types)] for index in range(at.count)])}


def _attention_types(text: PretrainedConfig, at: _Positions) -> dict[str, Any]:
    """Replace [[pattern, times], ...] by one pattern of all layers, once."""
    return {"attention_types": [[at.one_a_layer(text.attention_layers), 1]]}


def _scale_depth(text: PretrainedConfig, at: _Positions) -> dict[str, Any]:
    """Keep scale_depth / sqrt(layers), the factor of each branch, to the last bit."""
    wanted, root = text.scale_depth / math.sqrt(at.count), math.sqrt(at.count + len(at.layers))
    value = wanted * root
    near = [value, math.nextafter(value, math.inf), math.nextafter(value, 0)]
    return {"scale_depth": min(near, key=lambda candidate: abs(candidate / root - wanted))}


REWRITTEN: Mapping[str, Callable[[Any, _Positions], dict[str, Any]]] = {
    "indexer_types": _indexers,
    "decoder_sparse_step": _sparse_step,
    "block_types": _cyclic_types,
    "attention_types": _attention_types,
    "scale_depth": _scale_depth,
}
