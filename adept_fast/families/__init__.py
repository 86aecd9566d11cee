"""What a decoder-only model is made of: its layers, what makes a copy of one silent, its per-layer config, its fused projections.

Nothing outside this package knows one family from another, and nothing in it knows one by name where its structure tells.
"""

from adept_fast.families.causality import require_causal
from adept_fast.families.config import broken_periods, expanded_config
from adept_fast.families.family import Family, describe
from adept_fast.families.fused import FUSED_ATTENTION, Part, fused_rows
from adept_fast.families.layers import (
    check_kind,
    decoder_layers,
    device_of,
    evaluating,
    head_logits,
    headless,
    hidden_of,
    last_hidden,
    layer_configs,
    layer_indices,
    layers_path,
    replaced_forward,
    text_config,
    vocabulary_of,
    with_hidden,
)
from adept_fast.families.native import has_native_layers, native_layers
from adept_fast.families.same import same_layers

__all__ = [
    "FUSED_ATTENTION",
    "Family",
    "Part",
    "broken_periods",
    "check_kind",
    "decoder_layers",
    "describe",
    "device_of",
    "evaluating",
    "expanded_config",
    "fused_rows",
    "has_native_layers",
    "head_logits",
    "headless",
    "hidden_of",
    "last_hidden",
    "layer_configs",
    "layer_indices",
    "layers_path",
    "native_layers",
    "replaced_forward",
    "require_causal",
    "same_layers",
    "text_config",
    "vocabulary_of",
    "with_hidden",
]
