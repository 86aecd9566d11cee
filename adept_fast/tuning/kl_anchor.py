"""A KL anchor to the base model: retention without replay data and without a second model.

    weight * mean over tokens of KL(base || model)

is added to the loss of every `every`-th optimizer step, on at most `tokens` tokens of a general corpus. The base is the same model with its
copies bypassed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.data.items import IGNORE, Item
from adept_fast.errors import InputError
from adept_fast.expansion.bypass import bypassed
from adept_fast.models.decoder_layers import device_of, head_logits, last_hidden
from adept_fast.models.gradient_scope import in_eval_mode
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards
from adept_fast.settings.validation import check, require_made
from adept_fast.tuning.fast_step import detached_embeddings
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Anchor:
    """Hold a model to its base: add weight * KL(base || model) to the loss of some steps, without a second model.

    Args:
        items: tokenised general text, from `load_items`; the steps cycle through it in order.
        weight: of the KL divergence in the loss, above 0.
        every: optimizer steps from one anchored step to the next.
        tokens: the most tokens a step takes.

    Raises:
        InputError: a wrong argument, or items without tokens.

    >>> anchor = Anchor(probe, weight=0.5, every=2, tokens=64)
    >>> expanded = expand_model(model, [1])
    >>> float(anchor.backward(expanded, step=2))        # the copies are still silent
    0.0
    """

    def __init__(self, items: Sequence[Item], weight: float, every: int = Tuning.anchor_every, tokens: int = Tuning.anchor_tokens) -> None:
        check(Tuning, "anchor_", needed=True, weight=weight, every=every, tokens=tokens)
        require_made("items", items, Sequence, "load_items(probe, tokenizer)")
        for item in items:
            require_made("an item of an anchor", item, Item, "load_items(probe, tokenizer) makes them of texts and records")
        items = [item for item in items if item.input_ids]
        if not items:
            raise InputError("an anchor needs items with a token to compare the model with the base on")
        self.weight, self.every = weight, every
        self.groups = list(_groups(items, tokens))

    def due(self, step: int) -> bool:
        """Return whether step `step` has the anchor's loss. Step 0 has none: the copies are still silent."""
        return step > 0 and step % self.every == 0

    def backward(self, model: PreTrainedModel, step: int, scale: Tensor | float = 1.0, share: bool = False) -> Tensor:
        """Add the gradient of the anchor's loss to .grad, in eval mode, and return the mean KL, 0-d, nats per token.

        scale: the loss scaler's factor. share: processes that hold the same model share the items, and each adds its part times their
        number, so that DDP's mean is the whole gradient. Processes of a sharded model (FSDP2) each run all items.
        """
        model = unwrapped(model)
        items = self.groups[step // self.every % len(self.groups)]
        tokens = sum(len(item.input_ids) for item in items)
        share = share and not in_shards(model)
        mine = distributed.share(items) if share else items
        kl = torch.zeros((), device=device_of(model))
        if mine:
            with in_eval_mode(model), detached_embeddings(model), torch.enable_grad():
                kl = divergence_from_base(model, mine) / tokens
                (kl * (self.weight * scale * (distributed.world_size() if share else 1))).backward()
        return distributed.total(kl.detach()) if share else kl.detach()


def divergence_from_base(model: PreTrainedModel, items: Sequence[Item]) -> Tensor:
    """Return KL(base || model) summed over all tokens of `items`, 0-d, nats, differentiable in the copies. They run as one padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(item.input_ids) for item in items], batch_first=True).to(device_of(model))
    there = torch.cat([torch.arange(len(item.input_ids)) + row * ids.shape[1] for row, item in enumerate(items)]).to(ids.device)
    with bypassed(model), torch.no_grad():
        base = _log_probabilities(model, ids, there)
    return functional.kl_div(_log_probabilities(model, ids, there), base, reduction="sum", log_target=True)


def _log_probabilities(model: PreTrainedModel, ids: Tensor, rows: Tensor) -> Tensor:
    """Return log probabilities, fp32 [rows, vocabulary]. rows: indices into the flattened batch."""
    if in_shards(model):  # FSDP2 gathers the shards only in a call of the whole model
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
    else:
        logits = head_logits(model, last_hidden(model, ids).flatten(0, 1)[rows])
    return logits.float().log_softmax(-1)


def _groups(items: Sequence[Item], tokens: int) -> Iterator[list[Item]]:
    """Cut items to `tokens` tokens, and group them so that no group has more."""
    group: list[Item] = []
    for item in items:
        cut = replace(item, input_ids=item.input_ids[:tokens], labels=(IGNORE,) * min(tokens, len(item.input_ids)))
        if group and sum(len(other.input_ids) for other in group) + len(cut.input_ids) > tokens:
            yield group
            group = []
        group.append(cut)
    yield group
