"""Measure the losses of each item of a corpus under each variant of a model, pack by pack, journalled and split over processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.finite import likely_cause
from adept_fast.runtime import distributed
from adept_fast.runtime.malloc import freed_memory_kept
from adept_fast.runtime.progress import Progress
from adept_fast.runtime.provenance import digest
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.journal import Journal
from adept_fast.scoring.packs import Pack, pack, packed
from adept_fast.scoring.scores import ItemScores
from adept_fast.scoring.settings import LOSSES
from adept_fast.scoring.sweep import SweepPlan
from adept_fast.settings.validation import require, require_made, require_path, require_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_losses(loss: str, losses: Collection[str]) -> None:
    """Raise InputError unless the primary loss and all others are known."""
    require("loss", loss, str, LOSSES)
    require_made("losses", losses, Collection, "give a list of further losses")
    for index, name in enumerate(losses):
        require(f"losses[{index}]", name, str, LOSSES)


class Masks(Protocol):
    """A model and `count` parts of it to mask, one at a time. identity: what identifies the parts in a journal, beside the model."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def plan(self) -> SweepPlan: ...

    @property
    def count(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def measure(self, pack: Pack, parts: Sequence[int], losses: Collection[str]) -> dict[str, Tensor]:
        """Return summed losses of each item of a pack by name, fp64 [items, 1 + parts], the baseline first."""

    def flops(self, pack: Pack, parts: Sequence[int]) -> float:
        """Return the FLOPs of `measure`."""


class Measuring:
    """Losses of items with each part of a model masked. A context manager, which closes the journal.

    losses: by name, fp64 [items, 1 + masks.count], the baseline first; NaN if not measured, inf if masking leaves no finite loss
    cost: FLOPs spent by all processes

    Measurements are written to the journal, and read from it if a killed run left them there.
    """

    def __init__(
        self,
        masks: Masks,
        items: Sequence[Item],
        losses: Collection[str],
        journal: Path | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        require_table("inputs", inputs)
        journal = journal and require_path("journal", journal)
        self.masks, self.items = masks, items
        self.names = [name for name in LOSSES if name in losses]
        self.losses = {name: torch.full((len(items), 1 + masks.count), torch.nan, dtype=torch.float64) for name in self.names}
        self.cost = 0.0
        config = masks.model.config
        shared = {
            "items": digest([[item.input_ids, item.labels] for item in items]),
            **masks.identity,
            "losses": self.names,
            "plan": vars(masks.plan),
        }
        if names := distributed.differing(shared):
            raise InputError(
                f"{', '.join(names)} of what is scored: not the same in all processes, which share it out: give all of them the same "
                "to score, on machines alike"
            )
        header = {
            "model": [config.name_or_path, str(masks.model.dtype), digest(config.to_dict())],
            **shared,
            "processes": distributed.world_size(),
            "inputs": dict(inputs or {}),
        }
        path = journal and journal.with_name(f"{journal.name}.{distributed.rank()}" if distributed.rank() else journal.name)
        self._journal = Journal(path, header) if path else None

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal:
            self._journal.close()

    def measure(self, title: str, indices: Sequence[int] | None = None, parts: Sequence[int] | None = None) -> None:
        """Fill in the losses of the items at `indices`, for the baseline and with each of `parts` masked. None means all."""
        indices = range(len(self.items)) if indices is None else indices
        parts = range(self.masks.count) if parts is None else parts
        packs = pack(self.items, indices, self.masks.plan.pack, "all" in self.names)
        costs = [self.masks.flops(each, parts) for each in packs]
        mine = _shares(costs, distributed.world_size())[distributed.rank()]
        found = torch.zeros(len(self.names), len(self.items), 1 + len(parts), dtype=torch.float64)
        total, items, done = sum(costs[at] for at in mine), sum(len(packs[at].items) for at in mine), 0  # time is that of the FLOPs
        with freed_memory_kept(), Progress(total=total, desc=title, bar_format="{l_bar}{bar}| [{elapsed}<{remaining}]") as bar:
            for at in mine:
                values = self._recorded(packs[at], parts)
                for name, rows in zip(self.names, found, strict=True):
                    rows[list(packs[at].items)] = torch.tensor(_infinities(values[name]), dtype=torch.float64)
                done += len(packs[at].items)
                bar.set_description_str(f"{title}, {done:,} of {items:,} items", refresh=False)
                bar.update(costs[at])
        found = distributed.total(found)
        columns = torch.tensor([0, *(1 + part for part in parts)])
        rows = torch.tensor(list(indices))
        for name, measured in zip(self.names, found, strict=True):
            self.losses[name][rows[:, None], columns] = measured[rows]
        self.cost += sum(costs)

    def whole_cost(self) -> float:
        """Return the FLOPs of measuring all parts on all items, one item per pack."""
        alone = pack(self.items, range(len(self.items)), 0, "all" in self.names)
        return sum(self.masks.flops(each, range(self.masks.count)) for each in alone)

    def item_scores(self, name: str) -> ItemScores:
        """Return the loss with each part masked minus the baseline's, summed over each item's tokens, and the number of those tokens."""
        counts = [len(item.input_ids) - 1 if name == "all" else item.supervised for item in self.items]
        losses = self.losses[name]
        base = None if name == "kl" else losses[:, 0].clone()
        return ItemScores(losses[:, 1:] - losses[:, :1], torch.tensor(counts, dtype=torch.float64), base)

    def _recorded(self, pack: Pack, parts: Sequence[int]) -> dict[str, list[list[float | None]]]:
        def run() -> dict[str, list[list[float | None]]]:
            return finite({name: values.tolist() for name, values in self._measured(pack, parts).items()})

        return self._journal.recorded([list(pack.items), list(parts)], run) if self._journal else run()

    def _measured(self, pack: Pack, parts: Sequence[int]) -> dict[str, Tensor]:
        """Measure a pack. A loss that masking makes NaN or infinite (float16 overflow, a router's division by 0) becomes inf.

        Raises InputError for an item whose unmasked loss is not finite.
        """
        found = self.masks.measure(pack, parts, self.names)
        if all(bool(values.isfinite().all()) for values in found.values()):
            return found
        if len(pack.items) > 1:  # within a pack the NaN of one item reaches all: its attention weight is 0, and 0 times NaN is NaN
            alone = [self._measured(packed(self.items, [index], "all" in self.names), parts) for index in pack.items]
            return {name: torch.cat([each[name] for each in alone]) for name in found}
        if not all(bool(values[0, 0].isfinite()) for values in found.values()):
            raise InputError(f"the loss of item {pack.items[0]} is not finite: {likely_cause(self.masks.model)}")
        return {name: values.where(values.isfinite(), torch.inf) for name, values in found.items()}


def _infinities(values: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Read null as inf: JSON has no infinity."""
    return [[math.inf if value is None else value for value in row] for row in values]


def _shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Assign indices of `costs` to processes: the costliest first, each to the process with the least so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        least = loads.index(min(loads))
        shares[least].append(at)
        loads[least] += costs[at]
    return shares
