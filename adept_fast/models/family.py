"""What a family is to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adept_fast.models.decoder_layers import layers_path
from adept_fast.models.silent_copies import silences

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """layers: path of the layer list. silent: per layer, which parameters and buffers (names within the layer) to fill with which
    value, so that a copy of the layer passes the residual stream through unchanged. gains: per layer, those that are gains of norms
    behind a branch (post-norm) rather than projections."""

    name: str
    layers: str
    silent: tuple[Mapping[str, float], ...]
    gains: tuple[frozenset[str], ...]


def describe(model: PreTrainedModel) -> Family:
    """The family of a model (meta tensors are enough) whose copies can be made silent.

    Raises UnsupportedFamilyError with the reason otherwise.
    """
    found = silences(model)
    return Family(model.config.model_type, layers_path(model), tuple(entry.fill for entry in found), tuple(entry.gains for entry in found))
