"""Importance of parameters and units for a corpus, from gradients.

    abs_taylor   |theta * g|, g the gradient of the token-weighted mean loss over the whole corpus, so batching changes nothing
    fisher       E[g^2], g the gradient of one sequence's negative log-likelihood, summed over its supervised tokens

Source: ADEPT (arXiv 2510.10071), section on unit importance: a first-order Taylor score with the absolute value.
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
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.models.finite import likely_cause, require_finite
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.models.unwrap import bare, unwrapped
from adept_fast.ops.gradient_sums.op import Dims, GradientSums
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.runtime.progress import Progress
from adept_fast.scoring.units import Units
from adept_fast.settings.validation import require_made, require_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sums:
    """Sums of one parameter along one dimension, or two adjacent ones taken as one, over all other dimensions.

    abs_taylor: sum |theta * g|, fp32 [indices], nats per token
    fisher: sum E[g^2], fp32 [indices]
    against: sums of m g, m^2 and g^2, fp64 [3, indices], with m the tensor that g is compared with; None unless asked for
    """

    abs_taylor: Tensor
    fisher: Tensor
    against: Tensor | None = None


@dataclass(frozen=True)
class UnitImportance:
    """Importance of each unit.

    abs_taylor: mean |theta * g| over the unit's parameters, fp64 [units], nats per token
    fisher: mean E[g^2] over the unit's parameters, fp64 [units]
    conflict: max(0, -cos) of momentum and g over the unit, fp64 [units]; None without momenta
    """

    units: Units
    abs_taylor: Tensor
    fisher: Tensor
    conflict: Tensor | None = None


def _require_finite(
    model: PreTrainedModel, losses: list[Tensor], found: Mapping[tuple[str, Dims], tuple[Tensor, Tensor]], title: str
) -> None:
    """Raise InputError for a loss or gradient that is not finite. Called once per corpus, so that no item waits for the device."""
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
    """Sum importances of the named parameters along the given dimensions: (name, dim) -> Sums.

    The call leaves .grad, the RNG and the training mode as they were. It needs memory for one fp32 gradient of all named parameters, and
    for the gradient of the largest of them.

    Args:
        dims: parameter name -> dimensions to keep
        share: split the items over processes that hold the same model (DDP); all get the sums over all items. Ignored for sharded (FSDP2)
            parameters, for which every process must be given, and runs, the same items
        against: parameter name -> tensor m of its shape, to compare the corpus gradient with

    Raises InputError for reentrant activation checkpointing, offloaded parameters, items without a supervised token, and losses or
    gradients that are not finite.
    """
    items = [item for item in items if item.supervised]
    if not items:
        raise InputError("no supervised token to take gradients from: give items with text, or with instruction and output")
    model = bare(model)
    parameters = {name: model.get_parameter(name) for name in dims}
    if offloaded := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise InputError(f"{offloaded[0]}: offloaded, and its importance needs it in memory: give a device_map that keeps it there")
    share = share and not in_shards(model)
    hooks = GradientSums(parameters, dims, products=False, running=True)
    mine = Progress(distributed.share(items) if share else items, desc=title, unit="item")
    with freed_memory_kept(), only_these_require_grad(model, parameters.values()), hooks as sums, mine as bar:
        losses = []
        for item in bar:
            sums.backward(loss := batch_loss(model, [item]))
            losses.append(loss.detach())
        found = sums.read(sum(item.supervised for item in items), share)
        _require_finite(model, losses, found, title)
        compared = sums.against(against or {})
    return {key: Sums(taylor.float(), (squares[0] / len(items)).float(), compared.get(key)) for key, (squares, taylor) in found.items()}


def unit_importance(units: Units, sums: Mapping[tuple[str, Dims], Sums]) -> UnitImportance:
    """Average the sums of each parameter over the units."""
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
    """Measure the importance of each unit of an expanded model for a probe, from gradients.

    In a copy that is still silent every |theta * g| is 0. The first rates therefore come from the copied layer
    (`adept_fast.expansion.first_importance.first_importance`).

    Args:
        model: an expanded model
        probe: records, a path or dataset name (with `tokenizer`), or tokenised items
        units: of this model, `Units.of(model)`
        share: split the items over processes, as `parameter_sums` does
        momenta: parameter name -> Adam's exp_avg, for every parameter of `units`, to measure where momentum and probe conflict

    Returns:
        UnitImportance: abs_taylor (nats per token), fisher and, with momenta, conflict, each fp64 [units]

    Raises:
        InputError: nothing in the probe is supervised, or the units are not of this model

    >>> expanded = expand_model(model, [0])
    >>> units = Units.of(expanded)
    >>> importance = score_units(expanded, probe, units)
    >>> len(importance.fisher) == len(units)
    True

    Source: ADEPT (arXiv 2510.10071), section on unit importance.
    """
    model = unwrapped(model)
    require_made("units", units, Units, "Units.of(model)")
    require_table("momenta", momenta)
    units.require_fitting(model)
    dims = {name: (cut.dims,) for name, cut in units.slices.items()}
    items = load_items(probe, tokenizer, vocabulary=vocabulary_of(model))
    return unit_importance(units, parameter_sums(model, items, dims, "unit importance", share, momenta))
