"""Divide copied layers into units: functional parts, each with a learning rate of its own.

A unit is a set of indices along one dimension, or two adjacent ones, of each of its parameters. A bias belongs to the unit of its weight.

    granularity   projections                                          expert tensors [experts, rows, columns]    norms, all others
    tensor        one unit each; one per part of a fused projection    one unit                                   one unit each
    head          attention by head (queries, keys and values by       one unit per expert                        one unit each
                  rows, output projection by columns); rest as tensor
    neuron        one unit per row; output projections per column      per expert and row if rows are the         one unit each
                                                                       experts' neurons, else per expert
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adept_fast.checkpoints.adept_config import record_of
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, text_config
from adept_fast.models.fused_projections import FUSED_ATTENTION, Part, fused_rows
from adept_fast.models.silent_copies import describe
from adept_fast.models.unwrap import unwrapped
from adept_fast.ops.gradient_sums.op import Dims
from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OUTPUTS = frozenset({"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense_4h_to_h"})  # cut by columns, in post-norm layers too
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", *FUSED_ATTENTION})


@dataclass(frozen=True)
class Unit:
    """A unit.

    name: "model.layers.4.mlp.up_proj", with "[12]" behind it for a row, head or fused part
    kind: the module type within which units are ranked
    size: its number of parameters
    gate: whether it is the gain that keeps a post-norm copy silent
    """

    name: str
    kind: str
    size: int
    gate: bool = False


@dataclass(frozen=True)
class Slices:
    """The unit of each index along `dim` of a parameter: int64 [parameter.shape[dim]], or [shape[dim], shape[dim + 1]]."""

    dim: int
    unit: Tensor

    @property
    def dims(self) -> Dims:
        """Return the dimensions along which gradient sums are needed."""
        return self.dim if self.unit.ndim == 1 else (self.dim, self.dim + 1)


@dataclass(frozen=True)
class Units:
    """The units of a model's copies, in the order of its parameters; iterable.

    Args:
        granularity: "tensor", "head" or "neuron" (units.py)
        units: name, kind and size of each
        slices: parameter name -> the unit of each of its indices

    Raises:
        InputError: from `of`, for an unknown granularity or a model without copies

    >>> units = Units.of(expand_model(model, [0]))
    >>> len(units), next(iter(units)).name
    (9, 'model.layers.1.self_attn.q_proj')

    Source: ADEPT (arXiv 2510.10071), section on unit-wise learning rates.
    """

    granularity: str
    units: tuple[Unit, ...]
    slices: dict[str, Slices]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    @classmethod
    def of(cls, model: PreTrainedModel, granularity: str = "tensor") -> Units:
        """Divide an expanded model's copies into units. Raises InputError for an unknown granularity or a model without copies."""
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
                    cut = _UnitBuilder(config, granularity, f"{family.layers}.{layer}.{path}".rstrip("."), names, slices)
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
        """Raise InputError unless these are units of this model."""
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
        """Return the number of parameters in each unit, int64 [units]."""
        return torch.tensor([unit.size for unit in self.units])

    def gather(self, sums: dict[str, Tensor]) -> Tensor:
        """Add the sums of each parameter, one per index of its slices (flat), into units: fp64 [units]."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for name, cut in self.slices.items():
            total.index_add_(0, cut.unit.flatten(), sums[name].double().cpu())
        return total

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """Turn one value per unit into fp32 multipliers per parameter: 0-d if it is a single unit, else one per index of its slices."""
        values, first = values.float(), {name: cut.unit.flatten()[0] for name, cut in self.slices.items()}
        return {name: values[first[name] if bool((cut.unit == first[name]).all()) else cut.unit] for name, cut in self.slices.items()}


@dataclass(frozen=True)
class _UnitBuilder:
    """Divide a module into units: append their (name, kind) to `names`, and add its parameters' indices to `slices`."""

    config: PretrainedConfig
    granularity: str
    module: str
    names: list[tuple[str, str]]
    slices: dict[str, Slices]

    def projection(self, own: dict[str, nn.Parameter], output: bool, transposed: bool, parent: nn.Module) -> None:
        """Divide a weight [out, in], or [in, out] if transposed, and its bias by output; an output projection by input."""
        kind, weight = self.module.rpartition(".")[2], own["weight"]
        dim = int(output != transposed)
        length = weight.shape[dim]
        fused = fused_rows(self.config, kind, length, getattr(parent, "head_dim", None))
        by_head = kind in ATTENTION or (output and any(name in ATTENTION for name, _ in parent.named_children()))
        index = self._units(fused if not output or len(fused) == 1 else [Part("", torch.arange(length), length)], length, by_head)
        self.slices[f"{self.module}.weight"] = Slices(dim, index)
        if "bias" in own:  # an output projection's bias spans all its columns: it joins the first unit
            self.slices[f"{self.module}.bias"] = Slices(0, torch.full(own["bias"].shape, int(index[0])) if output else index)

    def _units(self, parts: list[Part], length: int, by_head: bool) -> Tensor:
        """Append the units of a projection, and return the unit of each of its `length` indices."""
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
        """Divide norms, convolutions and states, one unit per tensor with its bias, and tensors of experts."""
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
        """Return the unit of each expert, [experts], or of each row of each, [experts, rows], if the rows are neurons."""
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
