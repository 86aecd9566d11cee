"""What makes a copy of a layer silent: which of its parameters and buffers to fill, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from adept_fast.errors import UnsupportedFamilyError
from adept_fast.families.layers import layers_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUT_PROJECTIONS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "fc_out"})
PRE_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "ln_1", "ln_2"})
REFUSED = {
    "gemma3n": "its layers share key-value caches and per-layer embeddings",
    "gpt2": "its attention scale can depend on the layer's index",
    "jamba": "its kinds of layer alternate with a fixed period",
    "minicpm3": "its residual scale depends on the number of layers",
    "diffllama": "its attention depends on the layer's depth",
    "rwkv": "its recurrent state is kept per layer index",
    "ctrl": "it has no list of residual layers",
    "openai-gpt": "it normalises after each residual sum",
    "zamba": "it shares blocks between layers",
}


@dataclass(frozen=True)
class Family:
    """layers: path of the layer list. silent: per layer, which parameters and buffers (names within the layer) to fill with which
    value, so that a copy of the layer passes the residual stream through unchanged."""

    name: str
    layers: str
    silent: tuple[Mapping[str, float], ...]


def describe(model: PreTrainedModel) -> Family:
    """The family of a model (meta tensors are enough) whose copies can be made silent.

    Raises UnsupportedFamilyError with the reason otherwise.
    """
    name = model.config.model_type
    if name in REFUSED:
        raise UnsupportedFamilyError(f"{name}: cannot be expanded: {REFUSED[name]}")
    path = layers_path(model)
    return Family(name, path, tuple(_silent(name, layer) for layer in model.get_submodule(path)))


def _silent(family: str, layer: nn.Module) -> dict[str, float]:
    def refuse(reason: str) -> UnsupportedFamilyError:
        return UnsupportedFamilyError(f"{family}: cannot be expanded: {reason}")

    silent: dict[str, float] = {}
    for name, child in layer.named_children():
        if "norm" in name or name.startswith("ln_"):
            if name not in PRE_NORMS:
                raise refuse(f"the norm {name!r} stands after a branch (post-norm), which would amplify the first updates of a silent copy")
            continue
        writing = [inner for inner, _ in child.named_modules() if inner.rpartition(".")[2] in OUTPUT_PROJECTIONS]
        if any(parameter.ndim > 2 for parameter in child.parameters()):
            raise refuse(f"{name!r} holds experts or convolutions")
        if len(writing) == 1:
            silent |= {f"{name}.{writing[0]}.{inner}": 0.0 for inner, _ in child.get_submodule(writing[0]).named_parameters()}
        elif any(True for _ in child.parameters()):
            raise refuse(f"{name!r} has {len(writing)} known output projections instead of one")
    if not silent:
        raise refuse("no output projection found in its layers")
    return silent
