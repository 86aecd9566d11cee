"""Measure the importance of parts of layers exactly, by masking: I(u) = loss(model with u zeroed) - loss(model), nats per supervised token.

    tensor   each projection: its output is set to 0 (zero queries attend evenly; a zero output projection bypasses its branch)
    head     each group of heads that share keys and values, and each of 8 equal groups of FFN neurons: the input that the branch's output
             projection reads from the group is set to 0, and so the group's contribution to the residual stream

The model runs once as it is, then once per layer, from that layer up, on a batch of the layer's units: sum over units of (layers - layer)
layer calls per token. If a family reads a module's weights without calling it (dt_proj of Mamba), they are set to 0, with one forward per
unit. Fused experts, which are no modules, are not units. Extends stage 1 of ADEPT (arXiv 2510.10071).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.models.cpu_layers import native_layers
from adept_fast.models.decoder_layers import (
    decoder_layers,
    device_of,
    evaluating,
    hidden_of,
    layer_configs,
    layer_indices,
    replaced_forward,
    vocabulary_of,
    with_hidden,
)
from adept_fast.models.silent_copies import describe
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime.provenance import digest
from adept_fast.scoring.item_losses import Measuring, require_losses
from adept_fast.scoring.layer_masking import item_losses
from adept_fast.scoring.packs import Pack
from adept_fast.scoring.scores import UnitScores
from adept_fast.scoring.settings import MASKED, Score
from adept_fast.scoring.sweep import SweepPlan, call_flops, plan, row_hidden
from adept_fast.scoring.units import OUTPUTS
from adept_fast.settings.validation import check, require

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FFN_GROUPS = 8
ATTENTION_MARKS = ("head_dim", "head_size", "num_heads", "num_attention_heads")


@dataclass(frozen=True)
class MaskedUnit:
    """A part of a layer: a module, or columns start to stop of its input. kind: its name within the layer, the same in every layer."""

    layer: int
    module: str
    kind: str
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"


def masked_units(model: PreTrainedModel, granularity: str, layers: Collection[int] | None = None) -> list[MaskedUnit]:
    """List the units of some layers, in their order; None: of all. Raises InputError for an unknown granularity or layer, or no units."""
    model = unwrapped(model)
    require("granularity", granularity, str, MASKED)
    modules, configs = decoder_layers(model), layer_configs(model)
    wanted = layer_indices(range(len(modules)) if layers is None else layers, len(modules))
    silent = describe(model).silent if granularity == "head" else ()
    found: list[MaskedUnit] = []
    for layer in wanted:
        config = configs[layer]
        for path, module in modules[layer].named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                continue
            if granularity == "tensor":
                found.append(MaskedUnit(layer, path, path))
            elif path.rpartition(".")[2] in OUTPUTS or f"{path}.weight" in silent[layer]:
                branch = path.rpartition(".")[0]
                width = weight.shape[_inputs(module)]
                groups = _head_groups(modules[layer].get_submodule(branch), config) or FFN_GROUPS
                for group in range(groups):
                    kind = f"{branch or path}[{group}]"
                    found.append(MaskedUnit(layer, path, kind, group * width // groups, (group + 1) * width // groups))
    if not found:
        raise InputError(f"{model.config.model_type}: its layers {wanted} have no projections to mask")
    return found


def _head_groups(branch: nn.Module, config: PretrainedConfig) -> int | None:
    """Return the number of groups of heads of a branch; None for a branch without heads."""
    if not any(hasattr(branch, mark) for mark in ATTENTION_MARKS):
        return None
    given = (getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads"))  # a state-space config has neither
    return next((count for count in given if count), None) or getattr(branch, "num_heads", None)


def forwards(units: Sequence[MaskedUnit], layers: int) -> float:
    """Return the cost of masking these units in forwards of a model of so many layers over the corpus, without the head."""
    return 1 + sum(layers - unit.layer for unit in units) / layers


def mask_units(
    model: PreTrainedModel,
    probe: str | Source | Iterable[Mapping[str, Any] | Item],
    granularity: str = "tensor",
    loss: str = "answer",
    *,
    layers: Collection[int] | None = None,
    losses: Collection[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    sweep_tokens: int | None = None,
    seed: int = Score.seed,
    journal: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> UnitScores:
    """Score each unit of the chosen layers: the loss with the unit zeroed minus the loss with it.

    If torch.distributed is initialised, each process holds a whole model and measures a part of the items.

    Args:
        model, probe, loss, losses, tokenizer, sweep_tokens, seed, journal, inputs: as of `score_layers`
        granularity: "tensor", each projection, or "head", each group of heads that share keys and values and each of 8 groups of neurons
        layers: indices of the layers whose units are scored; None: all

    Returns:
        UnitScores: values, low and high, each [units], nats per supervised token, with 95 % bootstrap intervals over items

    Raises:
        InputError: an unknown granularity, loss or layer, or a probe with nothing supervised

    >>> scores = mask_units(model, probe, layers=[1])
    >>> scores.kinds[:2]
    ('self_attn.q_proj', 'self_attn.k_proj')

    Source: extends stage 1 of ADEPT (arXiv 2510.10071) to parts of layers.
    """
    model = unwrapped(model)
    check(Score, sweep_tokens=sweep_tokens, seed=seed)
    require_losses(loss, losses)
    items = [item for item in load_items(probe, tokenizer, vocabulary=vocabulary_of(model)) if item.supervised]
    started, units = time.perf_counter(), masked_units(model, granularity, layers)
    with evaluating(model):
        masks = UnitMasks(model, plan(model, items, sweep_tokens), units)
        with Measuring(masks, items, {loss, *losses}, journal, inputs) as measuring:
            measuring.measure(f"masking {len(units)} units")
            per_item = {name: measuring.item_scores(name) for name in measuring.names}
    return UnitScores(
        granularity=granularity,
        loss=loss,
        layers=tuple(unit.layer for unit in units),
        kinds=tuple(unit.kind for unit in units),
        profiles={name: scores.profile("masking", seed) for name, scores in per_item.items()},
        items=len(items),
        tokens=sum(item.supervised for item in items),
        seconds=time.perf_counter() - started,
        model=model.config.name_or_path or "",
        inputs=dict(inputs or {}),
        per_item=per_item,
    )


@dataclass(frozen=True)
class UnitMasks:
    """Units of a model, zeroed one at a time: `Masks` of item_losses.py."""

    model: PreTrainedModel
    plan: SweepPlan
    units: Sequence[MaskedUnit]

    @property
    def count(self) -> int:
        return len(self.units)

    @property
    def identity(self) -> dict[str, str]:
        return {"units": digest([vars(unit) for unit in self.units])}

    def flops(self, pack: Pack, parts: Sequence[int]) -> float:
        layers = len(decoder_layers(self.model))
        return call_flops(self.model, pack, layers * forwards([self.units[part] for part in parts], layers), 1 + len(parts))

    @torch.no_grad()
    def measure(self, pack: Pack, parts: Sequence[int], losses: Collection[str]) -> dict[str, Tensor]:
        pack = pack.to(device_of(self.model))
        modules = decoder_layers(self.model)
        outputs: list[Any] = []
        most = max(1, self.plan.tokens // pack.tokens) if self.plan.swept else 1
        with native_layers(self.model, pack.lengths) if self.plan.native else nullcontext():
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(replaced_forward(module, _keeping(module.forward, outputs)))
                hidden = [row_hidden(self.model, pack)]
            for layer, group in groupby((self.units[part] for part in parts), key=lambda unit: unit.layer):
                together = list(group)
                for start in range(0, len(together), most):
                    hidden.append(self._masked(pack, modules, outputs, layer, together[start : start + most]))
        return item_losses(self.model, torch.cat(hidden), pack, losses)

    def _masked(self, pack: Pack, modules: nn.ModuleList, outputs: Sequence[Any], layer: int, units: Sequence[MaskedUnit]) -> Tensor:
        """Compute hidden states at pack.rows with each unit of a layer masked; the layers below replay their recorded `outputs`."""
        with ExitStack() as stack:
            for module, output in zip(modules[:layer], outputs, strict=False):
                stack.enter_context(replaced_forward(module, lambda *_, output=output, **__: _copied(output)))
            with ExitStack() as masks:
                called = _mask(masks, modules[layer], units)
                found = row_hidden(self.model, pack)
            for row, unit in zip(found, units, strict=True):
                if unit.module not in called:
                    with replaced_forward(modules[layer], _without_weights(modules[layer], unit)):
                        row.copy_(row_hidden(self.model, pack)[0])
        return found


def _copied(output: Any) -> Any:
    """Clone the hidden states of a layer's output: the model may change them in place, and the record must stay."""
    return with_hidden(output, hidden_of(output).clone())


def _keeping(forward: Any, outputs: list[Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return _copied(outputs[-1])

    return run


def _mask(stack: ExitStack, layer: nn.Module, units: Sequence[MaskedUnit]) -> set[str]:
    """Within `stack`, run `layer` on one copy of its input per unit, with unit i masked in copy i. Returns the paths of modules called."""
    own = layer.forward
    called: set[str] = set()

    def spread(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as hooks:  # only during this call: layers may share modules
            for path in dict.fromkeys(unit.module for unit in units):
                hooks.callback(_hook(layer.get_submodule(path), path, units, called).remove)
            return own(hidden.repeat(len(units), 1, 1), *args, **kwargs)

    stack.enter_context(replaced_forward(layer, spread))
    return called


def _hook(module: nn.Module, path: str, units: Sequence[MaskedUnit], called: set[str]) -> RemovableHandle:
    """Zero the units of this module, in its output or its input, each in its own row of the batch."""

    def cleared(values: Any) -> Any:
        called.add(path)
        if isinstance(values, tuple):  # a router returns weights and the indices of their experts
            return tuple(map(cleared, values))
        if not values.is_floating_point():
            return values
        values = values.clone(memory_format=torch.contiguous_format)
        for unit, row in zip(units, values.view(len(units), -1, values.shape[-1]), strict=True):
            if unit.module == path:
                row[:, unit.start : unit.stop] = 0
        return values

    if units[0].stop is None:
        return module.register_forward_hook(lambda _, __, output: cleared(output))
    return module.register_forward_pre_hook(lambda _, args: (cleared(args[0]), *args[1:]))


def _without_weights(layer: nn.Module, unit: MaskedUnit) -> Callable[..., Any]:
    """Return the layer's forward with the unit's weights set to 0, for a module whose weights the family reads without calling it."""
    own, module = layer.forward, layer.get_submodule(unit.module)
    if unit.stop is None:
        weights = [parameter.data for parameter in module.parameters(recurse=False)]
    else:
        weights = [module.get_parameter("weight").data.narrow(_inputs(module), unit.start, unit.stop - unit.start)]

    def run(*args: Any, **kwargs: Any) -> Any:
        saved = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.zero_()
            return own(*args, **kwargs)
        finally:
            for weight, values in zip(weights, saved, strict=True):
                weight.copy_(values)

    return run


def _inputs(module: nn.Module) -> int:
    """Return the dimension of a projection's weight that indexes its inputs."""
    return 0 if type(module).__name__ == "Conv1D" else 1
