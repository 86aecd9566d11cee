"""Importance of parameters and units for a corpus, from gradients.

    abs_taylor   |theta * g|, g the gradient of the token-weighted mean loss over the whole corpus (so it does not depend on batching)
    fisher       E[g^2], g the gradient of one sequence's negative log-likelihood (the sum over its supervised tokens)
    cumulative   E|theta * g|, g the same: `sequence_sums`

Source: ADEPT (arXiv 2510.10071), section on unit importance; its first-order Taylor score with the absolute value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.models import bare, unwrapped, vocabulary_of
from adept_fast.models.finite import likely_cause, require_finite
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.ops.gradient_sums.op import Dims, GradientSums
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.runtime.progress import Progress
from adept_fast.scoring.units import Units
from adept_fast.settings.validation import require_made

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sums:
    """Sums over all dimensions but one, or but two adjacent ones (flat): fp32 [parameter.shape[dim]] each.

    against: sums of m g, m^2 and g^2, m what the corpus gradient g was compared with, fp64 [3, parameter.shape[dim]], where asked for.
    """

    abs_taylor: Tensor
    fisher: Tensor
    against: Tensor | None = None


@dataclass(frozen=True)
class SequenceSums:
    """Sums over all dimensions but one of g^2, |theta g| and theta g: fp32 [parameter.shape[dim]] each, nats (squared for g^2)."""

    squares: Tensor
    absolutes: Tensor
    products: Tensor


@dataclass(frozen=True)
class UnitImportance:
    """abs_taylor: mean |theta * g| per unit, fp64 [units], nats per token; fisher: mean E[g^2] per unit, fp64 [units];
    conflict: max(0, -cos) of momentum and g over the unit, fp64 [units], where momenta were given."""

    units: Units
    abs_taylor: Tensor
    fisher: Tensor
    conflict: Tensor | None = None


def _gathered(
    model: PreTrainedModel,
    items: Sequence[Item],
    dims: Mapping[str, Sequence[Dims]],
    title: str,
    corpus: bool,
    at_once: int,
    share: bool = False,
    against: Mapping[str, Tensor] | None = None,
) -> tuple[dict[tuple[str, Dims], tuple[Tensor, Tensor]], dict[tuple[str, Dims], Tensor], int]:
    """(what GradientSums.read and .against give after one backward for each `at_once` supervised items, the number of backwards)."""
    items = [item for item in items if item.supervised]
    if not items:
        raise InputError("no supervised token to take gradients from: give items with text, or with instruction and output")
    model = bare(model)
    parameters = {name: model.get_parameter(name) for name in dims}
    if offloaded := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise InputError(f"{offloaded[0]}: offloaded, and its importance needs it in memory: give a device_map that keeps it there")
    batches = [items[start : start + at_once] for start in range(0, len(items), at_once)]
    share = share and not in_shards(model)
    hooks = GradientSums(parameters, dims, not corpus, corpus)
    with freed_memory_kept(), only_these_require_grad(model, parameters.values()), hooks as sums:
        mine = distributed.share(batches) if share else batches
        losses = []
        for batch in Progress(mine, desc=title, unit="item" if at_once == 1 else "batch"):
            sums.backward(loss := batch_loss(model, batch))
            losses.append(loss.detach())
        found = sums.read(sum(item.supervised for item in items), share)
        _require_finite(model, losses, found, title)
        return found, sums.against(against or {}), len(batches)


def _require_finite(
    model: PreTrainedModel, losses: list[Tensor], found: Mapping[tuple[str, Dims], tuple[Tensor, Tensor]], title: str
) -> None:
    """Raise InputError for a loss, or a gradient of finite losses, that is not finite. Once a corpus: nothing waits for the device."""
    if losses:
        require_finite(model, torch.stack(losses).cpu(), f"{title}: the loss of item")
    for (name, _), (sums, taylor) in found.items():
        if not bool(sums.isfinite().all() and taylor.isfinite().all()):
            raise InputError(f"{title}: the gradient of {name} is not finite, although the loss is: {likely_cause(model)}")


def parameter_sums(
    model: PreTrainedModel,
    items: Sequence[Item],
    dims: Mapping[str, Sequence[Dims]],
    title: str = "importance",
    share: bool = False,
    against: Mapping[str, Tensor] | None = None,
) -> dict[tuple[str, Dims], Sums]:
    """Sums of the named parameters along the given dimensions: (name, dim) -> Sums. Leaves .grad, RNG and training mode as they were.

    |theta g| needs the corpus gradient, so memory for one fp32 gradient of the named parameters, beside that of the largest of them.
    share: processes that hold the same model (DDP) and are given the same items share them out; all get the sums over all items.
    against: name -> tensor m like the parameter, whose product with the corpus gradient is summed too: Sums.against.
    Sharded (FSDP2) parameters work where every process is given the same items, each of which all of them run, whatever `share` says.
    Raises InputError for reentrant checkpointing.
    """
    found, compared, backwards = _gathered(model, items, dims, title, True, 1, share, against)
    return {key: Sums(taylor.float(), (sums[0] / backwards).float(), compared.get(key)) for key, (sums, taylor) in found.items()}


def sequence_sums(
    model: PreTrainedModel,
    items: Sequence[Item],
    dims: Mapping[str, Sequence[Dims]],
    title: str = "importance",
    batch: int = 1,
) -> dict[tuple[str, Dims], SequenceSums]:
    """Means over sequences of each sequence's own sums: (name, dim) -> SequenceSums; memory for the gradient of one parameter.

    batch > 1: means over batches of as many sequences, g the gradient of their summed loss. That is cheaper and another quantity: its
    squares hold products of different sequences' gradients, and are not Fisher information.
    """
    found, _, backwards = _gathered(model, items, dims, title, False, batch)
    return {key: SequenceSums(*(sums / backwards).float().unbind(0)) for key, (sums, _) in found.items()}


def unit_importance(units: Units, sums: Mapping[tuple[str, Dims], Sums]) -> UnitImportance:
    """Means over units of per-index sums of their parameters."""
    picked = {name: sums[name, cut.dims] for name, cut in units.slices.items()}
    abs_taylor = units.gather({name: entry.abs_taylor for name, entry in picked.items()}) / units.sizes
    fisher = units.gather({name: entry.fisher for name, entry in picked.items()}) / units.sizes
    compared = {name: entry.against for name, entry in picked.items() if entry.against is not None}
    conflict = None
    if len(compared) == len(picked):
        both, own, other = (units.gather({name: terms[kind] for name, terms in compared.items()}) for kind in range(3))
        conflict = (-both / (own * other).sqrt().clamp_min(torch.finfo(both.dtype).tiny)).clamp(0, 1)
    return UnitImportance(units, abs_taylor, fisher, conflict)


def score_units(
    model: PreTrainedModel,
    probe: str | Source | Iterable[Mapping[str, Any] | Item],
    units: Units,
    tokenizer: PreTrainedTokenizerBase | None = None,
    share: bool = False,
    momenta: Mapping[str, Tensor] | None = None,
) -> UnitImportance:
    """Importance of each unit of an expanded model for the probe. In a copy that is still silent all |theta g| are 0: see
    `adept_fast.expansion.first_importance` for the first rates. share: as in `parameter_sums`. momenta: parameter name -> Adam's
    exp_avg of all parameters of `units`, to see where they conflict with the probe. Raises InputError for a probe with nothing
    supervised."""
    model = unwrapped(model)
    require_made("units", units, Units, "Units.of(model)")
    units.require_fitting(model)
    dims = {name: (cut.dims,) for name, cut in units.slices.items()}
    items = load_items(probe, tokenizer, vocabulary=vocabulary_of(model))
    return unit_importance(units, parameter_sums(model, items, dims, "unit importance", share, momenta))
