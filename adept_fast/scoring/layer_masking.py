"""Layer importance by masking out, exact: I(l) = loss(model without layer l) - loss(model), in nats per supervised token.

With layer l bypassed the residual stream passes through it unchanged. All layers of a pack of items are measured by one sweep
(sweep.py); the head runs on the tokens that count only. Source: ADEPT (arXiv 2510.10071), stage 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adept_fast.models import decoder_layers, device_of
from adept_fast.models.lm_head import token_losses, variant_losses
from adept_fast.scoring.packs import Pack
from adept_fast.scoring.settings import LOSSES
from adept_fast.scoring.sweep import SweepPlan, flops, one_by_one, sweep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerMasks:
    """Each layer of a model, to be bypassed: the masks of measuring.py."""

    model: PreTrainedModel
    plan: SweepPlan
    identity: ClassVar[Mapping[str, Any]] = {}

    @property
    def count(self) -> int:
        return len(decoder_layers(self.model))

    def measure(self, pack: Pack, layers: Sequence[int], losses: Collection[str]) -> dict[str, Tensor]:
        return measure(self.model, pack, layers, losses, self.plan)

    def flops(self, pack: Pack, layers: Sequence[int]) -> float:
        return flops(self.model, pack, layers, self.plan)


@torch.no_grad()
def measure(model: PreTrainedModel, pack: Pack, layers: Sequence[int], losses: Collection[str], plan: SweepPlan) -> dict[str, Tensor]:
    """Summed losses of each item of a pack, fp64 [items, 1 + layers] by name, the baseline first and then the model without each layer.

    "answer": cross-entropy of the supervised tokens; "all": of all tokens (the pack must be made for it); "kl": KL(base || masked) summed
    over the supervised positions, 0 for the baseline itself.
    """
    pack = pack.to(device_of(model))
    hidden = sweep(model, pack, layers, plan) if plan.swept else one_by_one(model, pack, layers)
    return item_losses(model, hidden, pack, losses)


def item_losses(model: PreTrainedModel, hidden: Tensor, pack: Pack, losses: Collection[str]) -> dict[str, Tensor]:
    """The losses of `measure` from hidden states after the final norm at pack.rows, [variants, rows, hidden]. NaN for the KL to a baseline
    whose own loss is not finite."""
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
    """Sums over the rows of each item: [variants, rows] -> fp64 [items, variants]."""
    return torch.zeros(items, len(values), dtype=torch.float64).index_add_(0, owners.cpu(), values.double().T.cpu())
