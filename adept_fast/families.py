"""What a decoder-only model is made of: its layers, the projections that write to the residual stream, the per-layer config fields.

Found by structure, not by architecture. Scoring needs the layers only; expansion needs a family whose copies can be made silent by
zeroing the output projections of both branches (pre-norm). Others are refused by name, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adept_fast.errors import UnsupportedFamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OUTPUT_PROJECTIONS = frozenset({"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "fc_out"})
PER_LAYER_CONFIG = ("layer_types", "no_rope_layers")  # lists with one entry a layer; an allowlist, as index lists can have that length too
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
    """layers: path of the layer list; outputs: names, within a layer, of the projections that write to the residual stream."""

    name: str
    layers: str
    outputs: tuple[str, ...]
    per_layer_config: tuple[str, ...]


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    return model.config.get_text_config(decoder=True)


def layers_path(model: PreTrainedModel) -> str:
    """Path of the decoder layers: the outermost module list with config.num_hidden_layers entries."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    if model.config.is_encoder_decoder:
        raise UnsupportedFamilyError(f"{model.config.model_type}: an encoder-decoder; adept_fast is for decoder-only models")
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UnsupportedFamilyError(f"{model.config.model_type}: no list of {count} decoder layers found")
    return min(found, key=lambda name: name.count("."))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(layers_path(model))


def describe(model: PreTrainedModel) -> Family:
    """The family of a model whose copies can be made silent. Raises UnsupportedFamilyError with the reason otherwise."""
    name = model.config.model_type
    if name in REFUSED:
        raise UnsupportedFamilyError(f"{name}: cannot be expanded: {REFUSED[name]}")
    path = layers_path(model)
    layers = model.get_submodule(path)
    outputs = {_outputs(name, layer) for layer in layers}
    if len(outputs) > 1:
        raise UnsupportedFamilyError(f"{name}: cannot be expanded: its layers are of different kinds")
    config = text_config(model)
    per_layer = tuple(key for key in PER_LAYER_CONFIG if isinstance(getattr(config, key, None), list))
    return Family(name, path, outputs.pop(), per_layer)


def _outputs(family: str, layer: nn.Module) -> tuple[str, ...]:
    def refuse(reason: str) -> UnsupportedFamilyError:
        return UnsupportedFamilyError(f"{family}: cannot be expanded: {reason}")

    outputs: list[str] = []
    for name, child in layer.named_children():
        if "norm" in name or name.startswith("ln_"):
            if name not in PRE_NORMS:
                raise refuse(f"the norm {name!r} stands after a branch (post-norm), which would amplify the first updates of a silent copy")
            continue
        writing = [inner for inner, module in child.named_modules() if inner.rpartition(".")[2] in OUTPUT_PROJECTIONS]
        if any(parameter.ndim > 2 for parameter in child.parameters()):
            raise refuse(f"{name!r} holds experts or convolutions")
        if len(writing) == 1:
            outputs.append(f"{name}.{writing[0]}")
        elif any(True for _ in child.parameters()):
            raise refuse(f"{name!r} has {len(writing)} known output projections instead of one")
    if not outputs:
        raise refuse("no output projection found in its layers")
    return tuple(outputs)


def fused_rows(config: PretrainedConfig, module: str, rows: int) -> list[tuple[str, int]]:
    """Parts of a fused projection as (name, rows), in order; a projection that is not fused is one part with an empty name."""
    if module == "qkv_proj":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        return [("q", queries), ("k", keys), ("v", keys)]
    if module == "gate_up_proj":
        return [("gate", rows // 2), ("up", rows // 2)]
    return [("", rows)]


def hidden_of(output: Tensor | tuple) -> Tensor:
    """The hidden states in what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    """The same kind of output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def last_hidden(model: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Hidden states after the final norm, [batch, tokens, hidden]."""
    return model.base_model(input_ids=input_ids, use_cache=False, **inputs)[0]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for a module's for the time being, and put back what stood there (accelerate patches instances too)."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of hidden states [n, hidden] taken after the final norm, through the model's own head.

    The model's forward runs with its body replaced, so logit scaling and soft-capping stay what the family makes them. The output type
    is the mixture-of-experts one because it has every field that any family reads.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    def body(*args: object, **kwargs: object) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden[None])

    with replaced_forward(model.base_model, body):
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
