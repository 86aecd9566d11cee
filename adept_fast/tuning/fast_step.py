"""Compute the training loss without logits.

    loss = sum over targets of -log p(target) / num_items_in_batch        (their mean without num_items_in_batch)

This is the loss of transformers' own models, except that a batch without targets gives 0, not 0 / 0. A frozen linear head gives the loss
and its gradient to the hidden states in one pass over the vocabulary. Autograd saves nothing where no input requires a gradient: layers
below the lowest copy run forward only, and frozen layers above it save only what the gradients to their inputs need.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.models.decoder_layers import device_of, evaluating, headless, text_config
from adept_fast.models.lm_head import projection
from adept_fast.models.unwrap import unwrapped
from adept_fast.ops.linear_cross_entropy.op import IGNORE, linear_cross_entropy
from adept_fast.ops.linear_cross_entropy.reference import Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
LOW_PRECISION = 2e-2
WHOLE = ("output_hidden_states", "output_attentions", "output_router_logits", "logits_to_keep")  # such a call runs the model's forward


@contextmanager
def fast_step(model: PreTrainedModel) -> Iterator[bool]:
    """Make `model(..., labels=...)` in training mode return its loss without logits, while inside the context.

    A model keeps its own forward where its head is trained, sharded or not a plain projection, and where its loss on a few tokens differs
    from this one (because it includes a router's loss, say). Calls in eval mode and calls without labels are not changed. Wrappers (DDP,
    FSDP2, accelerate's autocast, torch.compile) may be put on and taken off while inside.

    Args:
        model: a causal language model of transformers.

    Yields:
        True where the loss is computed this way, False where the model keeps its own forward.

    >>> ids = torch.arange(3, 40)[None]
    >>> with fast_step(model.train()):
    ...     model(input_ids=ids, labels=ids).loss.backward()
    """
    model = unwrapped(model)
    own = model.forward
    scale = _scale_and_softcap(model)
    active = True
    if scale is None or not _same_loss(model, own, scale):
        yield False
        return

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        tuples = kwargs.get("return_dict") is False
        ignored = kwargs.get("ignore_index", IGNORE)
        if not (active and wanted and model.training) or tuples or ignored != IGNORE or any(kwargs.get(key) for key in WHOLE):
            return own(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=_loss(model, scale, *args, **kwargs))

    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield True
    finally:
        active = False
        if vars(model).get("forward") is forward:  # otherwise a wrapper holds it, and `active` makes it the model's own again
            if before is None:
                del model.forward
            else:
                model.forward = before


def _scale_and_softcap(model: PreTrainedModel) -> tuple[float, float] | None:
    layer = model.get_output_embeddings()
    if layer is None or any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    row = torch.randn(1, layer.weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(layer.weight)
    head = projection(model, row)
    return None if head is None else (head.scale, head.softcap)


def _loss(
    model: PreTrainedModel,
    scale: tuple[float, float],
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    return_dict: bool | None = None,
    **inputs: Any,
) -> Tensor:
    with detached_embeddings(model):
        hidden = headless(model)(*args, **{**inputs, "use_cache": False})[0]
    if shift_labels is None:
        assert labels is not None  # one of the two is given
        shift_labels = functional.pad(labels, (0, 1), value=IGNORE)[..., 1:]
    targets = shift_labels.to(hidden.device)
    if targets.numel() == hidden.shape[:-1].numel():  # the model flattens both
        targets = targets.reshape(hidden.shape[:-1])
    layer = model.get_output_embeddings()
    losses = linear_cross_entropy(hidden, Projection(layer.weight, layer.bias, *scale), targets)
    there = (targets != IGNORE).sum()
    count = there if num_items_in_batch is None else num_items_in_batch
    count = count.to(hidden.device) if isinstance(count, Tensor) else count
    return losses.sum() / torch.where(there == 0, 1, count)  # without targets count may be 0


@contextmanager
def detached_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Detach the embeddings' output, which transformers makes require a gradient under gradient checkpointing.

    Otherwise every layer would run backward.
    """
    if not getattr(model, "_require_grads_hooks", None):
        yield
        return
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.detach())
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _same_loss(model: PreTrainedModel, own: Any, scale: tuple[float, float]) -> bool:
    """Return whether `_loss` equals the model's own loss on eight tokens."""
    config = text_config(model)
    if getattr(config, "output_router_logits", False):
        return False
    ids = (torch.arange(2, 10, device=device_of(model)) * 7 % config.vocab_size)[None]
    given = {"input_ids": ids, "labels": ids}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(own).parameters.values()):
        given["num_items_in_batch"] = torch.tensor(5)
    with evaluating(model):
        expected, found = own(**given, use_cache=False).loss, _loss(model, scale, **given)
    return bool((expected - found).abs() <= TOLERANCE.get(model.dtype, LOW_PRECISION) * expected.abs())
