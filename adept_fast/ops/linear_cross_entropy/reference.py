"""Cross-entropy of a linear head in plain torch, a few rows at a time: the definition that all backends follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.number_formats import accumulator


class Projection(NamedTuple):
    """A linear head: logits = softcap * tanh(scale * (weight @ h + bias) / softcap).

    weight: [vocabulary, width]. bias: [vocabulary]. softcap: 0 for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0


class RowLosses(NamedTuple):
    """Results of each row.

    losses: nats [rows].
    argmax: most likely token, int64 [rows].
    kl: divergence in nats [rows]; [0] without variants.
    gradient: of the row's loss to its hidden state [rows, width]; [0, width] if not asked for.
    """

    losses: Tensor
    argmax: Tensor
    kl: Tensor
    gradient: Tensor


def logits(hidden: Tensor, head: Projection) -> Tensor:
    """Compute logits [..., vocabulary] in fp32 (fp64 for fp64)."""
    dtype = accumulator(hidden)
    z = torch.nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)) * head.scale
    return torch.tanh(z / head.softcap) * head.softcap if head.softcap else z


def linear_cross_entropy(hidden: Tensor, head: Projection, targets: Tensor, variants: int = 0, gradient: bool = False) -> RowLosses:
    """Compute the losses of rows, in fp32 (fp64 for fp64).

    hidden: [rows, width].
    targets: token ids, int64 [rows].
    variants: if > 0, the rows are [variants, rows / variants] flattened: one corpus, run by several variants of a model. `kl` is then
        KL(variant 0 || variant).
    gradient: whether to compute the gradient too.
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
