"""Whether a model reads ahead: then its next-token losses mean nothing, however good they look.

    r = sum over t < T of c_t . h_t        a causal model: dr / de_T = 0, exactly        (h: last hidden states, e: token embeddings)

A gradient rather than a second input with another last token: where that changes which expert the last token goes to, rounding changes
with the number of tokens an expert is given, and may send an earlier token to another expert too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.decoder_layers import device_of, evaluating, last_hidden, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16
LEAST = 1e-6  # bidirectional models of random weights have 0.05 and more, causal ones 0


def require_causal(model: PreTrainedModel) -> None:
    """Raise UnsupportedFamilyError where the last of 16 tokens moves the hidden states before it. Takes one forward and backward.

    A model whose weights are not all in memory, or that cannot be differentiated in eval mode, passes untried.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        ahead, behind = _reach(model)
    except (RuntimeError, ValueError, AssertionError):
        return
    if ahead > LEAST * behind:
        way_out = "adept_fast is for causal models"
        if getattr(model.config, "is_decoder", None) is False:
            way_out = "set is_decoder to true in its config.json"
        what = "hidden states depend on later tokens, so next-token losses mean nothing"
        raise UnsupportedFamilyError(f"{model.config.model_type}: reads ahead: {what}: {way_out}")


def _reach(model: PreTrainedModel) -> tuple[float, float]:
    """Norms of dr / de_T and of dr / de_t, t < T."""
    embeddings, embedded = model.get_input_embeddings(), []

    def watch(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which a model may change in place

    tokens = vocabulary_of(model)
    ids = (torch.arange(TOKENS) + tokens // 2) % tokens  # special tokens, which some models mask, stand at the ends
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
