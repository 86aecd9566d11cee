"""Collate packed documents for a model, and check once before the first step that it does not attend across them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import default_data_collator

from adept_fast.data.packing import Blocks, flattened
from adept_fast.models.decoder_layers import device_of, evaluating, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest logit; a leak measures 0.1 and more
LOW_PRECISION = 0.05
Collator = Callable[[list[Mapping[str, Tensor]]], dict[str, Any]]


def collator(model: PreTrainedModel) -> Collator:
    """Return the collator of blocks: rows with restarting position_ids, or one flattened row under flash attention."""
    if "flash" not in (text_config(model)._attn_implementation or ""):
        return default_data_collator
    taken = inspect.signature(model.forward).parameters.values()
    return partial(flattened, boundaries=any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken))


@torch.no_grad()
def isolates_documents(model: PreTrainedModel, blocks: Blocks, collate: Collator) -> bool:
    """Return whether a packed document gets the logits that it gets alone. True without blocks.

    The last document of a batch of two equal blocks is compared, in a block of several documents where there is one.
    """
    if not len(blocks):
        return True
    index = next((index for index in range(len(blocks)) if len(blocks.documents(index)) > 1), 0)
    lengths = blocks.documents(index)
    start, stop = sum(lengths[:-1]), sum(lengths)
    block = {key: value[:stop] for key, value in blocks[index].items() if key != "labels"}
    batch = {key: value.to(device_of(model)) if isinstance(value, Tensor) else value for key, value in collate([block, block]).items()}
    with evaluating(model):
        alone = model(input_ids=block["input_ids"][None, start:].to(device_of(model)), use_cache=False).logits[0]
        try:
            packed = model(**batch, use_cache=False).logits.flatten(0, 1)[stop + start :]
        except ValueError:  # transformers raises it for layers that cannot mask documents
            return False
    tolerance = TOLERANCE.get(alone.dtype, LOW_PRECISION) * float(alone.abs().max())
    return bool((packed - alone).abs().max() <= tolerance)
