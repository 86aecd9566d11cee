"""Compute losses of hidden states through a model's own head, without storing logits if the head is a plain linear projection.

If the logits are softcap * tanh(scale * (W h + b) / softcap), scale and soft-cap come from the config, and two rows are checked against the
model's own forward. Any other head runs as the family wrote it, a few rows at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from adept_fast.models.decoder_layers import head_logits, text_config
from adept_fast.ops.linear_cross_entropy import op as fused
from adept_fast.ops.linear_cross_entropy.op import IGNORE, Divergence
from adept_fast.ops.linear_cross_entropy.reference import Projection, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # rows of logits in memory at once, for heads that need them
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # config fields by which families divide logits
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_scales: WeakKeyDictionary[nn.Module, tuple[nn.Module, tuple[float, float] | None]] = WeakKeyDictionary()  # one entry per model


@torch.no_grad()
def projection(model: PreTrainedModel, hidden: Tensor) -> Projection | None:
    """Return the head as a linear projection with scale and soft-cap, or None. Checked once per model, on rows of `hidden` [n, width]."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None  # wrapped, quantised or offloaded: the logits depend on more than the weight
    if type(layer.weight.data) is not Tensor or layer.weight.device != hidden.device or not len(hidden):
        return None  # sharded, or on another device
    known = _scales.get(model)
    if known is None or known[0] is not layer:
        known = _scales[model] = (layer, _scale_and_softcap(model, layer, hidden[:1]))
    return Projection(layer.weight, layer.bias, *known[1]) if known[1] else None


def _scale_and_softcap(model: PreTrainedModel, layer: nn.Linear, row: Tensor) -> tuple[float, float] | None:
    config = text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    for name in DIVISORS:
        scale /= float(getattr(config, name, None) or 1.0)
    softcap = next((float(cap) for name in SOFTCAPS if (cap := getattr(config, name, None))), 0.0)
    largest = logits(row, Projection(layer.weight, layer.bias)).abs().amax().clamp_min(1e-6)
    rows = torch.cat([row, (row * (100 / largest)).to(row.dtype)])  # the second is large enough for a soft-cap to change it
    expected = head_logits(model, rows).float()
    found = logits(rows, Projection(layer.weight, layer.bias, scale, softcap))
    if found.shape != expected.shape:
        return None
    tolerance = 2e-2 if layer.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    close = (found - expected).abs().amax(1) <= tolerance * expected.abs().amax(1)
    return (scale, softcap) if bool(close.all()) else None


def _frozen(head: Projection) -> bool:
    return not (torch.is_grad_enabled() and (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)))


def token_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Compute -log p(target) from hidden states after the final norm: hidden [..., width], targets [...] -> fp32 [...], 0 for target -100.

    Differentiable in `hidden`, and in the head if it is trained; its logits are then stored.
    """
    head = projection(model, hidden.flatten(0, -2))
    if head is not None and _frozen(head):
        return fused.linear_cross_entropy(hidden, head, targets)
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    there = (wanted != IGNORE).nonzero()[:, 0]
    if not len(there):
        return rows[there].float().sum() + torch.zeros(targets.shape, device=hidden.device)  # an empty sum, which is differentiable
    losses = [
        functional.cross_entropy(head_logits(model, rows[part]).float(), wanted[part], reduction="none") for part in there.split(ROWS)
    ]
    return torch.zeros(len(wanted), device=hidden.device).index_put((there,), torch.cat(losses)).view(targets.shape)


@torch.no_grad()
def token_predictions(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the losses of hidden [n, width], as `token_losses` does, and the most likely token of each row, int64 [n]."""
    head = projection(model, hidden)
    if head is not None:
        return fused.linear_predictions(hidden, head, targets)
    losses, best = [hidden.new_zeros(0, dtype=torch.float32)], [targets[:0]]
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        z = head_logits(model, rows).float()
        losses.append(functional.cross_entropy(z, wanted, ignore_index=IGNORE, reduction="none"))
        best.append(z.argmax(-1))
    return torch.cat(losses), torch.cat(best)


@torch.no_grad()
def variant_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Divergence:
    """Compute losses and KL(variant 0 || variant), [variants, rows] each, from hidden [variants, rows, width] and targets [rows]."""
    head = projection(model, hidden.flatten(0, 1))
    if head is not None:
        return fused.linear_divergence(hidden, head, targets)
    losses, kl = (torch.zeros(hidden.shape[:2], device=hidden.device) for _ in range(2))
    at_once = max(1, ROWS // len(hidden))
    for part in (targets != IGNORE).nonzero()[:, 0].split(at_once):
        logs = head_logits(model, hidden[:, part].flatten(0, 1)).float().log_softmax(-1).unflatten(0, (len(hidden), len(part)))
        losses[:, part] = -logs.gather(-1, targets[part].expand(len(hidden), -1)[..., None])[..., 0]
        for variant, log in enumerate(logs):
            kl[variant, part] = (logs[0].exp() * (logs[0] - log)).sum(-1)
    return Divergence(losses, kl)
