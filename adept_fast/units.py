"""What a unit is: a functional part of a copied layer that gets a learning rate of its own.

granularity "tensor": each attention projection, each MLP projection, each norm (the parts of a fused projection apart);
"head": projections named q_proj, k_proj, v_proj, qkv_proj (by rows) and o_proj (by columns) cut by head; the rest as "tensor";
"neuron": the projections cut by row, output projections by column; norms whole.
A unit is a set of indices along one dimension of each of its parameters; a bias belongs to the unit of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.families import describe, fused_rows, text_config
from adept_fast.record import record_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GRANULARITIES = ("tensor", "head", "neuron")
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"})


@dataclass(frozen=True)
class Unit:
    """name: "model.layers.4.mlp.up_proj" (and "[12]" for a row, head or fused part); kind: the module type that units are ranked within."""

    name: str
    kind: str
    size: int


@dataclass(frozen=True)
class Slices:
    """Which unit each index along `dim` of a parameter belongs to: int64 [parameter.shape[dim]]."""

    dim: int
    unit: Tensor


@dataclass(frozen=True)
class Units:
    """Units of a model's copies, in the order of its parameters; iterable. `slices` maps parameter names to their units."""

    granularity: str
    units: tuple[Unit, ...]
    slices: dict[str, Slices]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    @classmethod
    def of(cls, model: PreTrainedModel, granularity: str = "tensor") -> Units:
        """The units of an expanded model's copies. Raises InputError for an unknown granularity or a model without copies."""
        if granularity not in GRANULARITIES:
            raise InputError(f"units must be one of {', '.join(GRANULARITIES)}, found {granularity!r}")
        record, family, config = record_of(model), describe(model), text_config(model)
        layers = model.get_submodule(family.layers)
        names: list[tuple[str, str]] = []
        slices: dict[str, Slices] = {}
        for layer in record.trained:
            outputs = {name.rpartition(".")[0] for name in family.silent[layer]}
            for path, module in layers[layer].named_modules():
                own = dict(module.named_parameters(recurse=False))
                if own:
                    _cut(f"{family.layers}.{layer}.{path}", path, own, path in outputs, config, granularity, names, slices)
        sizes = torch.zeros(len(names), dtype=torch.int64)
        for name, cut in slices.items():
            parameter = model.get_parameter(name)
            sizes.index_add_(0, cut.unit, torch.full_like(cut.unit, parameter.numel() // parameter.shape[cut.dim]))
        units = tuple(Unit(name, kind, int(size)) for (name, kind), size in zip(names, sizes, strict=True))
        return cls(granularity, units, slices)

    @property
    def sizes(self) -> Tensor:
        """Parameters in each unit, int64 [units]."""
        return torch.tensor([unit.size for unit in self.units])

    def gather(self, sums: dict[str, Tensor]) -> Tensor:
        """Per-index sums of each parameter (along the dimension of its slices) summed into units, fp64 [units]."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for name, cut in self.slices.items():
            total.index_add_(0, cut.unit, sums[name].double().cpu())
        return total

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """One value per unit as fp32 multipliers per parameter: 0-d where a parameter is one unit, else one per index of its dim."""
        values = values.float()
        return {
            name: values[cut.unit[0]] if bool((cut.unit == cut.unit[0]).all()) else values[cut.unit] for name, cut in self.slices.items()
        }


def _cut(
    module: str,
    path: str,
    parameters: dict[str, nn.Parameter],
    output: bool,
    config: PretrainedConfig,
    granularity: str,
    names: list[tuple[str, str]],
    slices: dict[str, Slices],
) -> None:
    """Cut one module into units: append their (name, kind) to `names` and their indices to `slices`."""
    kind = path.rpartition(".")[2]
    weight = next((parameter for parameter in parameters.values() if parameter.ndim == 2), None)
    if weight is None:
        names.append((module, kind))
        unit = len(names) - 1
        for name, parameter in parameters.items():
            slices[f"{module}.{name}"] = Slices(0, torch.full((parameter.shape[0],), unit))
        return
    dim = 1 if output else 0
    parts = fused_rows(config, kind, weight.shape[0]) if dim == 0 else [("", weight.shape[1])]
    index = torch.empty(weight.shape[dim], dtype=torch.int64)
    at = 0
    for part, length in parts:
        step = _step(kind, length, config, granularity)
        count = length // step
        first = len(names)
        part_kind = f"{kind}[{part}]" if part else kind
        for number in range(count):
            label = ",".join(filter(None, [part, str(number) if count > 1 else ""]))
            names.append((f"{module}[{label}]" if label else module, part_kind))
        index[at : at + length] = first + torch.arange(length) // step
        at += length
    for name, parameter in parameters.items():
        if parameter.ndim == 2 or dim == 0:
            slices[f"{module}.{name}"] = Slices(dim if parameter.ndim == 2 else 0, index)
        else:  # the bias of an output projection lies across its columns: it goes with their first unit
            slices[f"{module}.{name}"] = Slices(0, torch.full((parameter.shape[0],), int(index[0])))


def _step(kind: str, length: int, config: PretrainedConfig, granularity: str) -> int:
    if granularity == "neuron":
        return 1
    if granularity == "head" and kind in ATTENTION:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return length
