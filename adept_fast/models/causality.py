"""Refuse a model that is not causal: its next-token losses mean nothing, however good they look.

    r = sum over t < T of c_t . h_t        causal: dr / de_T = 0 exactly        (h: last hidden states, e: token embeddings, c: random)

The check takes a gradient instead of a second forward with another last token. In a mixture of experts another last token may go to another
expert; the number of tokens per expert then changes, with it rounding, and so possibly the expert of an earlier token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.decoder_layers import device_of, evaluating, last_hidden, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16
LEAST = 1e-6  # random bidirectional models measure 0.05 or more, causal ones 0

_found_causal: WeakSet[nn.Module] = WeakSet()


def require_causal(model: PreTrainedModel) -> None:
    """Raise UnsupportedFamilyError if the last of 16 tokens influences earlier hidden states. Costs one forward and backward, once for
    each model in memory.

    A model with weights offloaded, or one that cannot be differentiated in eval mode, passes without the check.
    """
    if model in _found_causal or any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        ahead, behind = _gradient_norms(model)
    except (RuntimeError, ValueError, AssertionError):
        return
    if ahead > LEAST * behind:
        way_out = "adept_fast is for causal models"
        if getattr(model.config, "is_decoder", None) is False:
            way_out = "set is_decoder to true in its config.json"
        what = "hidden states depend on later tokens, so next-token losses mean nothing"
        raise UnsupportedFamilyError(f"{model.config.model_type}: reads ahead: {what}: {way_out}")
    _found_causal.add(model)


def _gradient_norms(model: PreTrainedModel) -> tuple[float, float]:
    """Return the norms of dr / de_T and of dr / de_t, t < T."""
    embeddings, embedded = model.get_input_embeddings(), []

    def watch(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # the model may change its copy in place

    tokens = vocabulary_of(model)
    ids = (torch.arange(TOKENS) + tokens // 2) % tokens  # from the middle: some models mask special tokens, which are first or last
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = embeddings.register_forward_hook(watch)
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            hidden = last_hidden(model, ids[None].to(device_of(model)))[:, :-1].float()
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            (gradient,) = torch.autograd.grad((hidden * weights.to(hidden.device)).sum(), embedded[:1])
    finally:
        hook.remove()
        for parameter in wanting:
            parameter.requires_grad_(True)
    norms = gradient[0].float().norm(dim=-1)
    return float(norms[-1]), float(norms[:-1].norm())
