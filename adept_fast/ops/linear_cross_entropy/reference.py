"""Cross-entropy of a linear head, in plain torch, a few rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.accumulator import accumulator


class Projection(NamedTuple):
    """A head: logits = softcap * tanh(scale * (weight @ h + bias) / softcap); weight [vocabulary, width]; softcap 0: none."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0


class RowLosses(NamedTuple):
    """Per row: the loss and the divergence in nats [rows] (kl: [0] where not asked for), the likeliest token; gradient: [rows, width]."""

    losses: Tensor
    argmax: Tensor
    kl: Tensor
    gradient: Tensor


def logits(hidden: Tensor, head: Projection) -> Tensor:
    """[..., vocabulary], in fp32 (fp64 for fp64)."""
    dtype = accumulator(hidden)
    z = torch.nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)) * head.scale
    return torch.tanh(z / head.softcap) * head.softcap if head.softcap else z


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """Losses of rows of `hidden` [rows, width]; targets: int64 [rows].

    variants > 0: the rows are as many runs of one corpus, one after the other, and `kl` is that of the first run to each.
    gradient: also that of each row's loss to its row of `hidden`. fp32 (fp64 for fp64). Holds a few rows of logits at a time.
    """
    rows, at_once = len(targets), 256
    found = []
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        z = logits(hidden[part], head)
        logs = z.log_softmax(-1)
        losses = -logs.gather(1, targets[part, None])[:, 0]
        kl = losses[:0]
        if variants:
            base = torch.arange(start, start + len(z), device=z.device) % (rows // variants)
            p = logits(hidden[base], head).log_softmax(-1)
            kl = (p.exp() * (p - logs)).sum(-1)
        grad = z.new_empty(0, hidden.shape[1])
        if gradient:
            slope = head.scale * (1 - (z / head.softcap).square()) if head.softcap else head.scale
            excess = logs.exp().scatter_add(1, targets[part, None], -torch.ones_like(losses)[:, None])
            grad = (excess * slope) @ head.weight.to(z.dtype)
        found.append(RowLosses(losses, z.argmax(-1), kl, grad))
    if not found:
        empty = hidden.new_empty(0, dtype=accumulator(hidden))
        return RowLosses(empty, targets[:0], empty, empty.new_empty(0, hidden.shape[1]))
    return RowLosses(*map(torch.cat, zip(*found, strict=True)))
