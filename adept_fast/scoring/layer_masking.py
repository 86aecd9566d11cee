"""Measure layer importance exactly, by masking: I(l) = loss(model without layer l) - loss(model), nats per supervised token.

The residual stream passes a masked layer unchanged. One sweep (sweep.py) measures all layers on a pack of items. The head runs on the
supervised tokens only. Source: ADEPT (arXiv 2510.10071), stage 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adept_fast.models.decoder_layers import decoder_layers, device_of
from adept_fast.models.lm_head import token_losses, variant_losses
from adept_fast.scoring.packs import Pack
from adept_fast.scoring.settings import LOSSES
from adept_fast.scoring.sweep import SweepPlan, flops, one_by_one, sweep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerMasks:
    """The layers of a model, bypassed one at a time: `Masks` of item_losses.py."""

    model: PreTrainedModel
    plan: SweepPlan
    identity: ClassVar[Mapping[str, Any]] = {}

    @property
    def count(self) -> int:
        return len(decoder_layers(self.model))

    @torch.no_grad()
    def measure(self, pack: Pack, layers: Sequence[int], losses: Collection[str]) -> dict[str, Tensor]:
        """Return summed losses of each item by name, fp64 [items, 1 + layers]: the baseline, then the model without each layer.

        answer: cross-entropy of the supervised tokens
        all: cross-entropy of all tokens; the pack must be made for it
        kl: KL(base || masked) summed over the supervised positions, 0 for the baseline
        """
        pack = pack.to(device_of(self.model))
        hidden = sweep(self.model, pack, layers, self.plan) if self.plan.swept else one_by_one(self.model, pack, layers)
        return item_losses(self.model, hidden, pack, losses)

    def flops(self, pack: Pack, layers: Sequence[int]) -> float:
        return flops(self.model, pack, layers, self.plan)


def item_losses(model: PreTrainedModel, hidden: Tensor, pack: Pack, losses: Collection[str]) -> dict[str, Tensor]:
    """Compute the losses of `LayerMasks.measure` from hidden states after the final norm at pack.rows, [variants, rows, hidden].

    The KL to a baseline whose own loss is not finite is NaN.
    """
    answered = pack.supervised.nonzero()[:, 0]
    found: dict[str, Tensor] = {}
    if "kl" in losses:
        both = variant_losses(model, hidden[:, answered], pack.targets[answered])
        found["answer"], found["kl"] = both.losses, both.kl
    if "all" in losses or not found:
        found["all"] = token_losses(model, hidden, pack.targets.expand(hidden.shape[:2]))
        found.setdefault("answer", found["all"][:, answered])
    owners = {name: pack.owners if name == "all" else pack.owners[answered] for name in found}
    summed = {name: _by_item(found[name], owners[name], len(pack.items)) for name in found}
    if "kl" in summed:
        summed["kl"][~summed["answer"][:, 0].isfinite(), 0] = torch.nan
    return {name: summed[name] for name in LOSSES if name in losses}


def _by_item(values: Tensor, owners: Tensor, items: int) -> Tensor:
    """Sum over the rows of each item: [variants, rows] -> fp64 [items, variants]."""
    return torch.zeros(items, len(values), dtype=torch.float64).index_add_(0, owners.cpu(), values.double().T.cpu())
