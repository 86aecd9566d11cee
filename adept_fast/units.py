"""What a unit is: a functional part of a copied layer that gets a learning rate of its own.

granularity "tensor": each attention projection, each MLP projection, each norm (the parts of a fused projection apart);
"head": projections named q_proj, k_proj, v_proj, qkv_proj (by rows) and o_proj (by columns) cut by head; the rest as "tensor";
"neuron": the projections cut by row, output projections by column; norms whole.
Tensors of experts, [experts, rows, columns], are cut by expert under "head" and "neuron"; what is neither is one unit a tensor.
A unit is a set of indices along one dimension of each of its parameters; a bias belongs to the unit of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.errors import InputError
from adept_fast.families import describe, fused_rows, head_size, text_config
from adept_fast.record import record_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GRANULARITIES = ("tensor", "head", "neuron")
OUTPUTS = frozenset({"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense_4h_to_h"})  # by columns in post-norm copies too
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"})


@dataclass(frozen=True)
class Unit:
    """name: "model.layers.4.mlp.up_proj" (and "[12]" for a row, head or fused part); kind: the module type that units are ranked within;
    gate: the gain that keeps a post-norm copy silent."""

    name: str
    kind: str
    size: int
    gate: bool = False


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
        gates: set[int] = set()
        for layer in record.trained:
            outputs = {name.rpartition(".")[0] for name in family.silent[layer]}
            for path, module in layers[layer].named_modules():
                own = dict(module.named_parameters(recurse=False))
                output = path in outputs or path.rpartition(".")[2] in OUTPUTS
                if own:
                    head = getattr(layers[layer].get_submodule(path.rpartition(".")[0]), "head_dim", None) or head_size(config)
                    transposed = type(module).__name__ == "Conv1D"  # GPT-2's, whose weight is [in, out]
                    name = f"{family.layers}.{layer}.{path}".rstrip(".")
                    _cut(name, path, own, output, transposed, config, head, granularity, names, slices)
            gates |= {int(slices[f"{family.layers}.{layer}.{name}"].unit[0]) for name in family.gains[layer]}
        sizes = torch.zeros(len(names), dtype=torch.int64)
        for name, cut in slices.items():
            sizes.index_add_(0, cut.unit, torch.full_like(cut.unit, model.get_parameter(name).numel() // len(cut.unit)))
        units = tuple(
            Unit(name, kind, int(size), index in gates) for index, ((name, kind), size) in enumerate(zip(names, sizes, strict=True))
        )
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
    transposed: bool,
    config: PretrainedConfig,
    head: int,
    granularity: str,
    names: list[tuple[str, str]],
    slices: dict[str, Slices],
) -> None:
    """Cut one module into units: append their (name, kind) to `names` and their indices to `slices`."""
    kind = path.rpartition(".")[2]
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    weight = matrices[0] if len(matrices) == 1 and matrices[0].ndim == 2 and set(parameters) <= {"weight", "bias"} else None
    if weight is None:
        for name, parameter in parameters.items():
            whole = set(parameters) <= {"weight", "bias"}
            if name != "bias" or not whole or "weight" not in parameters:
                experts = len(parameter) if parameter.ndim == 3 and granularity != "tensor" and not whole else 1
                label, kind_of = (module, kind) if whole else (f"{module}.{name}", name)
                first = len(names)
                names += [(f"{label}[{number}]" if experts > 1 else label, kind_of) for number in range(experts)]
            length = len(parameter) if parameter.ndim else 1
            slices[f"{module}.{name}"] = Slices(0, first + torch.arange(length) // (length // experts))
        return
    dim = int(output != transposed)
    parts = [("", weight.shape[dim])] if output else fused_rows(config, kind, weight.shape[dim])
    index = torch.empty(weight.shape[dim], dtype=torch.int64)
    at = 0
    for part, length in parts:
        step = _step(kind, length, head, granularity)
        step = step if length % step == 0 else length
        count = length // step
        first = len(names)
        part_kind = f"{kind}[{part}]" if part else kind
        for number in range(count):
            label = ",".join(filter(None, [part, str(number) if count > 1 else ""]))
            names.append((f"{module}[{label}]" if label else module, part_kind))
        index[at : at + length] = first + torch.arange(length) // step
        at += length
    for name, parameter in parameters.items():
        if parameter.ndim == 2 or not output:
            slices[f"{module}.{name}"] = Slices(dim if parameter.ndim == 2 else 0, index)
        else:  # the bias of an output projection lies across its columns: it goes with their first unit
            slices[f"{module}.{name}"] = Slices(0, torch.full((parameter.shape[0],), int(index[0])))


def _step(kind: str, length: int, head: int, granularity: str) -> int:
    if granularity == "neuron":
        return 1
    if granularity == "head" and kind in ATTENTION:
        return head
    return length
