"""The losses of each item of a corpus under each variant of a model, measured pack by pack: journalled, and shared out over processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast import distributed
from adept_fast.allocator import freed_memory_kept
from adept_fast.data.items import Item
from adept_fast.families import decoder_layers
from adept_fast.importance import masking
from adept_fast.importance.journal import Journal
from adept_fast.importance.packs import Pack, pack
from adept_fast.importance.sweep import SweepPlan, flops
from adept_fast.inputs import digest
from adept_fast.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Measuring:
    """losses: by name, fp64 [items, 1 + layers], the baseline first; NaN where not measured. cost: FLOPs spent by all processes."""

    def __init__(
        self,
        model: PreTrainedModel,
        items: Sequence[Item],
        losses: Collection[str],
        plan: SweepPlan,
        journal: Path | None = None,
        inputs: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.model, self.items, self.plan, self.quiet = model, items, plan, quiet
        self.layers = len(decoder_layers(model))
        self.names = [name for name in masking.LOSSES if name in losses]
        self.losses = {name: torch.full((len(items), 1 + self.layers), torch.nan, dtype=torch.float64) for name in self.names}
        self.cost = 0.0
        header = {
            "model": [model.config.name_or_path, str(model.dtype), digest(model.config.to_dict())],
            "items": digest([[item.input_ids, item.labels] for item in items]),
            "losses": self.names,
            "plan": vars(plan),
            "processes": distributed.processes(),
            "inputs": dict(inputs or {}),
        }
        path = journal and journal.with_name(f"{journal.name}.{distributed.rank()}" if distributed.rank() else journal.name)
        self._journal = Journal(path, header) if path else None

    def measure(self, indices: Sequence[int], layers: Sequence[int], title: str = "scoring") -> None:
        """Fill in the losses of the items at `indices` for the baseline and for the model without each of `layers`."""
        packs = pack(self.items, indices, self.plan.pack, "all" in self.losses)
        costs = [flops(self.model, each, layers, self.plan) for each in packs]
        mine = _shares(costs, distributed.processes())[distributed.rank()]
        found = torch.zeros(len(self.names), len(self.items), 1 + len(layers), dtype=torch.float64)
        total = sum(costs[at] for at in mine)
        with freed_memory_kept(), Progress(total=total, desc=title, unit="FLOP", unit_scale=True, quiet=self.quiet) as bar:
            for at in mine:
                values = self._recorded(packs[at], layers)
                for name, rows in zip(self.names, found, strict=True):
                    rows[list(packs[at].items)] = torch.tensor(values[name], dtype=torch.float64)
                bar.update(costs[at])
        found = distributed.total(found)
        columns = torch.tensor([0, *(1 + layer for layer in layers)])
        rows = torch.tensor(list(indices))
        for name, measured in zip(self.names, found, strict=True):
            self.losses[name][rows[:, None], columns] = measured[rows]
        self.cost += sum(costs)

    def whole_cost(self) -> float:
        """FLOPs of measuring all layers on all items, whatever the packs."""
        alone = pack(self.items, range(len(self.items)), 0, "all" in self.losses)
        return sum(flops(self.model, each, range(self.layers), self.plan) for each in alone)

    def _recorded(self, pack: Pack, layers: Sequence[int]) -> dict[str, list[list[float]]]:
        def run() -> dict[str, list[list[float]]]:
            return {name: values.tolist() for name, values in masking.measure(self.model, pack, layers, self.names, self.plan).items()}

        return self._journal.recorded([list(pack.items), list(layers)], run) if self._journal else run()

    def close(self) -> None:
        if self._journal:
            self._journal.close()

    def differences(self, name: str) -> Tensor:
        """Loss without each layer minus loss with it, summed over each item's tokens, fp64 [items, layers]."""
        return self.losses[name][:, 1:] - self.losses[name][:, :1]


def _shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Places of `costs` for each process, the costliest first, each to the one that has least so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        least = loads.index(min(loads))
        shares[least].append(at)
        loads[least] += costs[at]
    return shares
