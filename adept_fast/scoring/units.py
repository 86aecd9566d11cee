"""What a unit is: a functional part of a copied layer that gets a learning rate of its own.

granularity "tensor": each attention projection, each MLP projection, each norm (the parts of a fused projection apart);
"head": query, key and value projections by rows and attention's output projection by columns cut by head; the rest as "tensor";
"neuron": the projections cut by row, output projections by column; norms whole.
Tensors of experts, [experts, rows, columns], are cut by expert under "head"; under "neuron" by expert and row where rows are the experts'
neurons, else by expert. What is neither is one unit a tensor.
A unit is a set of indices along one dimension, or two adjacent ones, of each of its parameters; a bias belongs to the unit of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.checkpoints.adept_config import record_of
from adept_fast.errors import InputError
from adept_fast.models import FUSED_ATTENTION, Part, decoder_layers, describe, fused_rows, text_config, unwrapped
from adept_fast.ops.gradient_sums.op import Dims
from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OUTPUTS = frozenset({"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense_4h_to_h"})  # by columns in post-norm copies too
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", *FUSED_ATTENTION})


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
    """Which unit each index along `dim` of a parameter belongs to: int64 [parameter.shape[dim]], or [shape[dim], shape[dim + 1]]."""

    dim: int
    unit: Tensor

    @property
    def dims(self) -> Dims:
        """What sums of gradients are asked for."""
        return self.dim if self.unit.ndim == 1 else (self.dim, self.dim + 1)


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
        require("granularity", granularity, str, GRANULARITIES)
        model = unwrapped(model)
        record, family, config = record_of(model), describe(model), text_config(model)
        layers = decoder_layers(model)
        names: list[tuple[str, str]] = []
        slices: dict[str, Slices] = {}
        gates: set[int] = set()
        for layer in record.trained:
            outputs = {name.rpartition(".")[0] for name in family.silent[layer]}
            for path, module in layers[layer].named_modules():
                own = dict(module.named_parameters(recurse=False))
                output = path in outputs or path.rpartition(".")[2] in OUTPUTS
                if own:
                    cut = _Cut(config, granularity, f"{family.layers}.{layer}.{path}".rstrip("."), names, slices)
                    weight = own.get("weight")
                    if set(own) <= {"weight", "bias"} and weight is not None and weight.ndim == 2:
                        parent = layers[layer].get_submodule(path.rpartition(".")[0])
                        transposed = type(module).__name__ == "Conv1D"  # GPT-2's, whose weight is [in, out]
                        cut.projection(own, output, transposed, parent)
                    else:
                        cut.other(own)
            gates |= {int(slices[f"{family.layers}.{layer}.{name}"].unit.flatten()[0]) for name in family.gains[layer]}
        sizes = torch.zeros(len(names), dtype=torch.int64)
        for name, sliced in slices.items():
            index = sliced.unit.flatten()
            sizes.index_add_(0, index, torch.full_like(index, model.get_parameter(name).numel() // len(index)))
        units = tuple(
            Unit(name, kind, int(size), index in gates) for index, ((name, kind), size) in enumerate(zip(names, sizes, strict=True))
        )
        return cls(granularity, units, slices)

    def require_fitting(self, model: nn.Module) -> None:
        """Raise InputError unless these are units of this model, not of another."""
        for name, cut in self.slices.items():
            try:
                shape = model.get_parameter(name).shape
            except AttributeError:
                raise InputError(f"units: {name} is no parameter of this model: cut it by Units.of(model)") from None
            found = shape[cut.dim : cut.dim + cut.unit.ndim] or (1,)
            if tuple(found) != tuple(cut.unit.shape):
                raise InputError(f"units: {name} is {tuple(shape)} in this model, not cut so: cut it by Units.of(model)")

    @property
    def sizes(self) -> Tensor:
        """Parameters in each unit, int64 [units]."""
        return torch.tensor([unit.size for unit in self.units])

    def gather(self, sums: dict[str, Tensor]) -> Tensor:
        """Per-index sums of each parameter (along the dimensions of its slices, flat) summed into units, fp64 [units]."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for name, cut in self.slices.items():
            total.index_add_(0, cut.unit.flatten(), sums[name].double().cpu())
        return total

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """One value per unit as fp32 multipliers per parameter: 0-d where a parameter is one unit, else one per index of its
        dim, or pair of indices."""
        values = values.float()
        return {name: values[cut.unit.flatten()[0]] if _one(cut.unit) else values[cut.unit] for name, cut in self.slices.items()}


def _one(unit: Tensor) -> bool:
    return bool((unit == unit.flatten()[0]).all())


@dataclass(frozen=True)
class _Cut:
    """Cuts a module into units: appends their (name, kind) to `names` and puts its parameters' indices into `slices`."""

    config: PretrainedConfig
    granularity: str
    module: str
    names: list[tuple[str, str]]
    slices: dict[str, Slices]

    def projection(self, own: dict[str, nn.Parameter], output: bool, transposed: bool, parent: nn.Module) -> None:
        """A weight [out, in] (or [in, out]) and its bias: by rows, an output projection by columns."""
        kind, weight = self.module.rpartition(".")[2], own["weight"]
        dim = int(output != transposed)
        length = weight.shape[dim]
        fused = fused_rows(self.config, kind, length, getattr(parent, "head_dim", None))
        by_head = kind in ATTENTION or (output and any(name in ATTENTION for name, _ in parent.named_children()))
        index = self._units(fused if not output or len(fused) == 1 else [Part("", torch.arange(length), length)], length, by_head)
        self.slices[f"{self.module}.weight"] = Slices(dim, index)
        if "bias" in own:  # that of an output projection lies across its columns: it goes with their first unit
            self.slices[f"{self.module}.bias"] = Slices(0, torch.full(own["bias"].shape, int(index[0])) if output else index)

    def _units(self, parts: list[Part], length: int, by_head: bool) -> Tensor:
        """The unit of each of a projection's `length` rows."""
        kind = self.module.rpartition(".")[2]
        index = torch.empty(length, dtype=torch.int64)
        for part, rows, head in parts:
            step = 1 if self.granularity == "neuron" else head if self.granularity == "head" and by_head else len(rows)
            step = step if len(rows) % step == 0 else len(rows)
            count, first = len(rows) // step, len(self.names)
            for number in range(count):
                label = ",".join(filter(None, [part, str(number) if count > 1 else ""]))
                self.names.append((f"{self.module}[{label}]" if label else self.module, f"{kind}[{part}]" if part else kind))
            index[rows] = first + torch.arange(len(rows)) // step
        return index

    def other(self, own: dict[str, nn.Parameter]) -> None:
        """Norms, convolutions, states: a unit a tensor, a bias with its weight; tensors of experts."""
        whole = set(own) <= {"weight", "bias"} and "weight" in own
        for name, parameter in own.items():
            label, kind = (self.module, self.module.rpartition(".")[2]) if whole else (f"{self.module}.{name}", name)
            weight = own.get(name.removesuffix("_bias"), parameter)
            if weight.ndim == 3 and not whole and self.granularity != "tensor":
                shape = parameter.shape if weight is parameter else (len(weight), 1, 0)
                self.slices[f"{self.module}.{name}"] = Slices(0, self._experts(label, kind, shape))
                continue
            if not (whole and name == "bias"):
                self.names.append((label, kind))
            self.slices[f"{self.module}.{name}"] = Slices(0, torch.full((len(parameter) if parameter.ndim else 1,), len(self.names) - 1))

    def _experts(self, label: str, kind: str, shape: Sequence[int]) -> Tensor:
        """The unit of each expert [experts], or of each row of each, [experts, rows], where the rows are neurons."""
        experts, rows, columns = shape
        if self.granularity != "neuron" or columns != self.config.hidden_size or rows == columns:
            first = len(self.names)
            self.names.extend((f"{label}[{expert}]", kind) for expert in range(experts))
            return first + torch.arange(experts)
        index = torch.empty(experts, rows, dtype=torch.int64)
        for expert in range(experts):
            for part in fused_rows(self.config, kind, rows):
                index[expert, part.rows] = len(self.names) + torch.arange(len(part.rows))
                name = f"{part.name}," if part.name else ""
                part_kind = f"{kind}[{part.name}]" if part.name else kind
                self.names.extend((f"{label}[{expert},{name}{row}]", part_kind) for row in range(len(part.rows)))
        return index
