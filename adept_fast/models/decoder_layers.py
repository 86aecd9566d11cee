"""Find the layers of a decoder-only model and the entry points of its forward, by structure, not by architecture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError, UnsupportedFamilyError
from adept_fast.settings.validation import require_made

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    return model.config.get_text_config(decoder=True)


def layer_configs(model: PreTrainedModel) -> Sequence[PretrainedConfig]:
    """Return the config of each layer: the text config, or the layer's own if fields differ from layer to layer."""
    config = text_config(model)
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * config.num_hidden_layers


def require_decoder_only(config: PretrainedConfig) -> None:
    """Raise UnsupportedFamilyError for a model that is not decoder-only."""
    if config.is_encoder_decoder or hasattr(config.get_text_config(decoder=True), "decoder_layers"):
        raise UnsupportedFamilyError(
            f"{config.model_type}: an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models"
        )


def layers_path(model: PreTrainedModel) -> str:
    """Return the path of the decoder layers: the outermost module list of the text decoder with config.num_hidden_layers entries."""
    require_decoder_only(model.config)
    if "shared_kv_states" in inspect.signature(model.forward).parameters:
        raise UnsupportedFamilyError(f"{model.config.model_type}: drafts for another model, whose keys and values it needs")
    count = getattr(text_config(model), "num_hidden_layers", None)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UnsupportedFamilyError(f"{model.config.model_type}: no list of {count} decoder layers found")
    decoder = model.get_decoder()  # the text model of a multimodal one
    return min(found, key=lambda name: (model.get_submodule(name) not in decoder.modules(), name.count(".")))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(layers_path(model)))


def layer_indices(given: Iterable[int], count: int, name: str = "layers") -> list[int]:
    """Return `given`, ascending. Raises InputError about `name` unless they are distinct layers of a model of `count`, one at least."""
    require_made(name, given, Iterable, "give layer indices, select_layers(scores) say")
    layers = list(given)
    known = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < count for layer in layers)
    if not layers or not known or len(set(layers)) < len(layers):
        raise InputError(f"{name} must be indices from 0 to {count - 1}, each once, found {layers}", name)
    return sorted(layers)


def hidden_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Return the hidden states in a decoder layer's output."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Tensor | tuple[Any, ...], hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """Return a decoder layer's output with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def headless(model: PreTrainedModel) -> nn.Module:
    """Return the module that computes the hidden states after the final norm.

    That is the base model, or the module that calls the layers if none is named (Llama 4 for text).
    """
    return model.base_model if model.base_model is not model else _stack(model)


def last_hidden(model: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Compute the hidden states after the final norm, [batch, tokens, hidden]."""
    return headless(model)(input_ids=input_ids, use_cache=False, **inputs)[0]


def _stack(model: PreTrainedModel) -> nn.Module:
    """Return the module that calls the layers."""
    return model.get_submodule(layers_path(model).rpartition(".")[0])


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, replace a module's forward; then restore the former one (accelerate patches instances too)."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context, put the model in eval mode; then restore every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute the logits [n, vocabulary] of hidden states [n, hidden] after the final norm, through the model's own head.

    The model's forward runs with its body replaced, so logit scaling and soft-capping are the family's. Anything else that a family reads
    from its body's output (attentions, router logits, shared keys and values) is None.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Output(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    def body(*args: object, **kwargs: object) -> Output:
        return Output(last_hidden_state=hidden[None])

    with ExitStack() as stack:  # both: OPT's head calls the inner one; families whose final norm is between them, the outer
        for module in {headless(model), _stack(model)}:
            stack.enter_context(replaced_forward(module, body))
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embeddings. Meta tensors are enough."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]


def device_of(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs: that of its first parameter in memory.

    accelerate marks offloaded parameters as meta. If all are offloaded, it is the device that accelerate runs the model on.
    """
    devices = [parameter.device for parameter in model.parameters()]
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    runs_on = (getattr(hook, "execution_device", None) for hook in hooks)
    there = next((device for device in devices if device.type != "meta"), None)
    return there or next((torch.device(device) for device in runs_on if device is not None), devices[0])
