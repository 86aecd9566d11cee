"""The config of an expanded model: the layer count and every field that says something per layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ONE_A_LAYER = ("layer_types", "no_rope_layers")  # an allowlist, as lists of indices can have that length too


def expanded_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """A copy of `config` (the whole one, of a multimodal model too) for the model with a copy right after each of `layers`.

    layers: indices in the unexpanded model, ascending, each once.
    """
    expanded = copy.deepcopy(config)
    text = expanded.get_text_config(decoder=True)
    entries = {key: list(value) for key in ONE_A_LAYER if isinstance(value := getattr(text, key, None), list)}
    text.num_hidden_layers += len(layers)
    for key, values in entries.items():
        setattr(text, key, [value for index, value in enumerate(values) for _ in range(2 if index in layers else 1)])
    return expanded
