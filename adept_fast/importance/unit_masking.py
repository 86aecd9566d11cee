"""Importance of the parts of a layer by masking out, exact: I(u) = loss(model with u zeroed) - loss(model), nats per supervised token.

    tensor   each projection: what it gives is 0 (a query projection of 0 attends evenly, an output projection of 0 bypasses its branch)
    head     each group of heads that share keys and values, and each of some equal groups of FFN neurons: what the output projection of
             the branch reads from the group is 0, so its contribution to the residual stream is

One forward of the model as it is, then for each layer one from there up for a batch of its units: sum over units of (layers - layer) layer
calls a token. What a family computes without calling a module (fused experts) is no unit. Extends stage 1 of ADEPT (arXiv 2510.10071).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adept_fast import distributed
from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.families import decoder_layers, describe, device_of, hidden_of, last_hidden, replaced_forward, text_config, with_hidden
from adept_fast.importance.journal import Journal
from adept_fast.importance.masking import LOSSES, item_losses
from adept_fast.importance.packs import Pack, pack
from adept_fast.importance.scores import ItemScores
from adept_fast.importance.sweep import SweepPlan, plan
from adept_fast.importance.unit_scores import UnitScores
from adept_fast.inputs import digest
from adept_fast.progress import Progress
from adept_fast.units import OUTPUTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRANULARITIES = ("tensor", "head")
FFN_GROUPS = 8
ATTENTION_MARKS = ("head_dim", "head_size", "num_heads", "num_attention_heads")


@dataclass(frozen=True)
class MaskedUnit:
    """A part of a layer: a module, or the columns start to stop of its input. kind: what it is compared with over layers."""

    layer: int
    module: str
    kind: str
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"


def masked_units(model: PreTrainedModel, granularity: str, layers: Collection[int] | None = None) -> list[MaskedUnit]:
    """The units of some layers (none: of all), by layer. Raises InputError for an unknown granularity, a wrong layer, or no units."""
    if granularity not in GRANULARITIES:
        raise InputError(f"units to mask must be one of {', '.join(GRANULARITIES)}, found {granularity!r}")
    modules, config = decoder_layers(model), text_config(model)
    wanted = sorted(range(len(modules)) if layers is None else set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(modules):
        raise InputError(f"layers must be from 0 to {len(modules) - 1}, found {wanted}")
    silent = describe(model).silent if granularity == "head" else ()
    found: list[MaskedUnit] = []
    for layer in wanted:
        for path, module in modules[layer].named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                continue
            if granularity == "tensor":
                found.append(MaskedUnit(layer, path, path))
            elif path.rpartition(".")[2] in OUTPUTS or f"{path}.weight" in silent[layer]:
                branch = path.rpartition(".")[0]
                width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
                attends = any(hasattr(modules[layer].get_submodule(branch), mark) for mark in ATTENTION_MARKS)
                groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads if attends else FFN_GROUPS
                for group in range(groups):
                    kind = f"{branch or path}[{group}]"
                    found.append(MaskedUnit(layer, path, kind, group * width // groups, (group + 1) * width // groups))
    if not found:
        raise InputError(f"{config.model_type}: its layers {wanted} have no projections to mask")
    return found


def forwards(units: Sequence[MaskedUnit], layers: int) -> float:
    """What masking these units costs, in forwards of a model of so many layers over the corpus (the head not counted)."""
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
    seed: int = 0,
    journal: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> UnitScores:
    """Importance of each unit of the chosen layers (none: all), nats per supervised token, with 95 % bootstrap intervals over items.

    granularity: "tensor" or "head"; loss, losses, probe, sweep_tokens, journal: as of `score_layers`. Where torch.distributed is
    initialised each process measures a part of the items. Raises InputError for what is unknown, and where a unit's module is not called.
    """
    for name in (loss, *losses):
        if name not in LOSSES:
            raise InputError(f"loss must be one of {', '.join(LOSSES)}, found {name!r}")
    items = [item for item in load_items(probe, tokenizer) if item.supervised]
    units, names = masked_units(model, granularity, layers), [name for name in LOSSES if name in {loss, *losses}]
    started, training = time.perf_counter(), model.training
    model.eval()
    planned = plan(model, items, sweep_tokens)
    packs = pack(items, range(len(items)), planned.pack, "all" in names)
    found = torch.zeros(len(names), len(items), 1 + len(units), dtype=torch.float64)
    header = {
        "model": [model.config.name_or_path, str(model.dtype), digest(model.config.to_dict())],
        "items": digest([[item.input_ids, item.labels] for item in items]),
        "units": digest([vars(unit) for unit in units]),
        "losses": names,
        "plan": vars(planned),
        "processes": distributed.processes(),
        "inputs": dict(inputs or {}),
    }
    rank = distributed.rank()
    kept = Journal(journal.with_name(f"{journal.name}.{rank}" if rank else journal.name), header) if journal else None
    for each in Progress(packs[rank :: distributed.processes()], desc=f"masking {len(units)} units", unit="pack", quiet=quiet):

        def run(each: Pack = each) -> dict[str, list[list[float]]]:
            return {name: values.tolist() for name, values in measure(model, each, units, names, planned).items()}

        values = kept.recorded(list(each.items), run) if kept else run()
        for name, rows in zip(names, found, strict=True):
            rows[list(each.items)] = torch.tensor(values[name], dtype=torch.float64)
    if kept:
        kept.close()
    model.train(training)
    found = distributed.total(found)
    per_item = {}
    for name, rows in zip(names, found, strict=True):
        counts = [len(item.input_ids) - 1 if name == "all" else item.supervised for item in items]
        base = None if name == "kl" else rows[:, 0].clone()
        per_item[name] = ItemScores(rows[:, 1:] - rows[:, :1], torch.tensor(counts, dtype=torch.float64), base)
    return UnitScores(
        granularity=granularity,
        loss=loss,
        layers=tuple(unit.layer for unit in units),
        kinds=tuple(unit.kind for unit in units),
        profiles={name: scores.profile("masking", seed) for name, scores in per_item.items()},
        items=len(items),
        tokens=sum(item.supervised for item in items),
        seconds=time.perf_counter() - started,
        model=model.config.name_or_path,
        inputs=dict(inputs or {}),
        per_item=per_item,
    )


@torch.no_grad()
def measure(
    model: PreTrainedModel, pack: Pack, units: Sequence[MaskedUnit], losses: Collection[str], plan: SweepPlan
) -> dict[str, Tensor]:
    """Summed losses of each item of a pack, fp64 [items, 1 + units] by name, the baseline first."""
    pack = pack.to(device_of(model))
    modules = decoder_layers(model)
    outputs: list[Any] = []
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, _keeping(module.forward, outputs)))
        hidden = [_forward(model, pack)]
    most = max(1, plan.tokens // pack.tokens) if plan.swept else 1
    for layer, group in groupby(units, key=lambda unit: unit.layer):
        together = list(group)
        for start in range(0, len(together), most):
            part = together[start : start + most]
            with ExitStack() as stack:
                for module, output in zip(modules[:layer], outputs, strict=False):
                    stack.enter_context(replaced_forward(module, lambda *_, output=output, **__: _copied(output)))
                called = _mask(stack, modules[layer], part)
                hidden.append(_forward(model, pack))
            for unit in part:
                if unit.module not in called:
                    raise InputError(f"{unit.name}: the model does not call this module, so it cannot be masked: leave its layer out")
    return item_losses(model, torch.cat(hidden), pack, losses)


def _forward(model: PreTrainedModel, pack: Pack) -> Tensor:
    positions = {"position_ids": pack.positions[None]} if len(pack.items) > 1 else {}
    hidden = last_hidden(model, pack.ids[None], **positions)
    return hidden[:, pack.rows.to(hidden.device)]


def _copied(output: Any) -> Any:
    """A layer's output with hidden states of its own: what the model changes in place behind the layer must not change what is kept."""
    return with_hidden(output, hidden_of(output).clone())


def _keeping(forward: Any, outputs: list[Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return _copied(outputs[-1])

    return run


def _mask(stack: ExitStack, layer: nn.Module, units: Sequence[MaskedUnit]) -> set[str]:
    """Let `layer` run on a batch of as many copies of its input as there are units, with unit i masked in copy i; who has been called."""
    own, called = layer.forward, set()

    def spread(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as hooks:  # for no longer: layers may share modules
            for path in dict.fromkeys(unit.module for unit in units):
                hooks.callback(_hook(layer.get_submodule(path), path, units, called).remove)
            return own(hidden.repeat(len(units), 1, 1), *args, **kwargs)

    stack.enter_context(replaced_forward(layer, spread))
    return called


def _hook(module: nn.Module, path: str, units: Sequence[MaskedUnit], called: set[str]) -> RemovableHandle:
    """Zero what the units of this module give, or what it reads from them, each in its own copy of the batch."""

    def cleared(values: Tensor) -> Tensor:
        called.add(path)
        values = values.clone(memory_format=torch.contiguous_format)
        for unit, row in zip(units, values.view(len(units), -1, values.shape[-1]), strict=True):
            if unit.module == path:
                row[:, unit.start : unit.stop] = 0
        return values

    if units[0].stop is None:
        return module.register_forward_hook(lambda _, __, output: cleared(output))
    return module.register_forward_pre_hook(lambda _, args: (cleared(args[0]), *args[1:]))
