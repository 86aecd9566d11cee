"""Whether a model keeps packed documents apart: checked once before the first step, packed against separate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adept_fast.data.packing import Blocks
from adept_fast.families import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest logit; a leak measures 0.1 and more
LOW_PRECISION = 0.05


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel, blocks: Blocks) -> bool:
    """True when the logits of a block's last document are those it gets alone (a block with one document only proves nothing: True)."""
    index = next((index for index in range(len(blocks)) if len(blocks.documents(index)) > 1), None)
    if index is None:
        return True
    training = model.training
    model.eval()
    lengths = blocks.documents(index)
    start, stop = sum(lengths[:-1]), sum(lengths)
    block = {key: value[None, :stop].to(device_of(model)) for key, value in blocks[index].items()}
    packed = model(input_ids=block["input_ids"], position_ids=block["position_ids"], use_cache=False).logits[:, start:]
    alone = model(input_ids=block["input_ids"][:, start:], use_cache=False).logits
    model.train(training)
    tolerance = TOLERANCE.get(alone.dtype, LOW_PRECISION) * float(alone.abs().max())
    return bool((packed - alone).abs().max() <= tolerance)
