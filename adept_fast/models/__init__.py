"""What a decoder-only model is made of: its layers, what makes a copy of one silent, its per-layer config, its fused projections.

Nothing outside this package knows one family from another, and nothing in it knows one by name where its structure tells.
"""

from adept_fast.models.causality import require_causal
from adept_fast.models.cpu_layers import has_native_layers, native_layers
from adept_fast.models.decoder_layers import (
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
from adept_fast.models.equal_layers import same_layers
from adept_fast.models.family import Family, describe
from adept_fast.models.fused_projections import FUSED_ATTENTION, Part, fused_rows
from adept_fast.models.layer_config import broken_periods, expanded_config
from adept_fast.models.unwrap import bare, unwrapped

__all__ = [
    "FUSED_ATTENTION",
    "Family",
    "Part",
    "bare",
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
    "unwrapped",
    "vocabulary_of",
    "with_hidden",
]
