"""An anchor to the base: retention without replay data and without a second model.

    weight * mean over tokens of KL(base || model)

is added to the loss of every `every`-th optimizer step, on `tokens` tokens of a general corpus. The base is the model with its copies
bypassed.
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
from adept_fast.expansion import bypassed
from adept_fast.models.decoder_layers import device_of, head_logits, last_hidden
from adept_fast.models.gradient_scope import in_eval_mode
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards
from adept_fast.settings.validation import check, require_made
from adept_fast.tuning.fast_step import embeddings_apart
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Anchor:
    """items: the general corpus, gone through in order, again and again. Which of them a step takes depends on its number alone."""

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
        """Whether step `step` (from 0, when copies are silent and there is nothing to hold) has the anchor's loss."""
        return step > 0 and step % self.every == 0

    def backward(self, model: PreTrainedModel, step: int, scale: Tensor | float = 1.0, share: bool = False) -> Tensor:
        """Add the gradient of the anchor's loss, times `scale` (a loss scaler's), to .grad: once a step, however many batches it
        accumulates. Returns the mean KL in nats per token. In eval mode, so that no random number is drawn.

        share: processes that hold the same model share the items out; each adds its part, so that the mean over processes, which DDP
        takes, is the whole gradient. Of a sharded model (FSDP2) all run all items, whatever `share` says."""
        model = unwrapped(model)
        items = self.groups[step // self.every % len(self.groups)]
        tokens = sum(len(item.input_ids) for item in items)
        share = share and not in_shards(model)
        mine = distributed.share(items) if share else items
        kl = torch.zeros((), device=device_of(model))
        if mine:
            with in_eval_mode(model), embeddings_apart(model), torch.enable_grad():
                kl = divergence_from_base(model, mine) / tokens
                (kl * (self.weight * scale * (distributed.processes() if share else 1))).backward()
        return distributed.total(kl.detach()) if share else kl.detach()


def divergence_from_base(model: PreTrainedModel, items: Sequence[Item]) -> Tensor:
    """KL(base || model) summed over all tokens of `items`, run as one padded batch, 0-d, nats; differentiable in the copies."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(item.input_ids) for item in items], batch_first=True).to(device_of(model))
    there = torch.cat([torch.arange(len(item.input_ids)) + row * ids.shape[1] for row, item in enumerate(items)]).to(ids.device)
    with bypassed(model), torch.no_grad():
        base = _log_probabilities(model, ids, there)
    return functional.kl_div(_log_probabilities(model, ids, there), base, reduction="sum", log_target=True)


def _log_probabilities(model: PreTrainedModel, ids: Tensor, rows: Tensor) -> Tensor:
    """fp32 [rows, vocabulary]."""
    if in_shards(model):  # only a call of the whole model gathers them
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
    else:
        logits = head_logits(model, last_hidden(model, ids).flatten(0, 1)[rows])
    return logits.float().log_softmax(-1)


def _groups(items: Sequence[Item], tokens: int) -> Iterator[list[Item]]:
    """Items, cut to `tokens`, in groups of at most so many."""
    group: list[Item] = []
    for item in items:
        cut = replace(item, input_ids=item.input_ids[:tokens], labels=(IGNORE,) * min(tokens, len(item.input_ids)))
        if group and sum(len(other.input_ids) for other in group) + len(cut.input_ids) > tokens:
            yield group
            group = []
        group.append(cut)
    yield group
