"""The results of scoring: one importance per layer, or per unit, with its uncertainty, for each loss that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import staged_file, write_json
from adept_fast.runtime.bootstrap import CONFIDENCE, bootstrap
from adept_fast.runtime.input_files import making_sense, read_json, regular
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.budget import LayerCosts
from adept_fast.settings.validation import check, require, shown

SCHEMA = 1
AGAIN = "delete it to score again"


@dataclass(frozen=True)
class Profile:
    """values [layers], in nats per supervised token where the method is masking (its docstring says so where not); low, high: bootstrap
    interval over items. inf, in JSON null: without it some item's loss is not finite, so it is above all others."""

    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    base_loss: float | None


@dataclass(frozen=True)
class ItemScores:
    """What a profile is averaged from. sums: fp64 [items, layers] (rank: [items, layers, kinds]), NaN where a race left an item out,
    inf where no finite loss is left;
    weights: fp64 [items]; base: the baseline's summed loss, fp64 [items], or nothing. Value of a layer: sum(sums) / sum(weights)."""

    sums: Tensor
    weights: Tensor
    base: Tensor | None = None

    def among(self, items: Tensor) -> ItemScores:
        """The same of some items, bool [items]."""
        return ItemScores(self.sums[items], self.weights[items], None if self.base is None else self.base[items])

    def profile(self, method: str, seed: int = 0) -> Profile:
        values, low, high = bootstrap(self.sums, self.weights, seed, STATISTICS.get(method))
        measured = self.base is not None and ~self.base.isnan()
        base = None if self.base is None else float(self.base[measured].sum() / self.weights[measured].sum())
        return Profile(tuple(values.tolist()), tuple(low.tolist()), tuple(high.tolist()), base)


def share_of_largest(means: Tensor) -> Tensor:
    """Means [n, layers] divided by the largest of each row."""
    return means / means.amax(-1, keepdim=True)


def mean_rank(means: Tensor) -> Tensor:
    """1 - mean over kinds of rank / layers, the highest of a kind having rank 1: [n, layers, kinds] -> [n, layers].

    A kind that a layer lacks is NaN there.
    """
    there = ~means.isnan()
    order = means.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = 1.0 + order.argsort(1).double()
    return 1 - (ranks * there).sum(2) / there.sum(2) / means.shape[1]


def require_scores(*several: object) -> None:
    """Raise InputError for what is no result of score_layers."""
    for scores in several:
        if not isinstance(scores, LayerScores):
            raise InputError(f"scores must be what score_layers returns, found {type(scores).__name__}: score_layers(model, probe)")


STATISTICS = {"cumulative": share_of_largest, "rank": mean_rank}  # of the weighted means; the other methods are the means themselves


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What results of scoring share. profiles: by loss name ("answer", "kl", "all"), of which `loss` names the primary one; items, tokens:
    how many were measured, supervised ones; inputs: what they were made from; per_item: the scores of single items, kept in a file beside.
    """

    method: str
    loss: str
    profiles: Mapping[str, Profile]
    items: int
    tokens: int
    seconds: float
    model: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    confidence: float = CONFIDENCE
    schema: int = SCHEMA
    per_item: Mapping[str, ItemScores] = field(default_factory=dict, compare=False)

    @property
    def values(self) -> tuple[float, ...]:
        return self.profiles[self.loss].values

    @property
    def low(self) -> tuple[float, ...]:
        return self.profiles[self.loss].low

    @property
    def high(self) -> tuple[float, ...]:
        return self.profiles[self.loss].high

    @property
    def base_loss(self) -> float | None:
        return self.profiles[self.loss].base_loss

    def save(self, path: str | Path) -> None:
        """Write PATH (scores.json, say), and per_item, where there is any, beside it as scores.items.safetensors."""
        from safetensors.torch import save_file

        tensors = {f"{name}.{key}": value for name, scores in self.per_item.items() for key, value in vars(scores).items()}
        if tensors:
            with staged_file(_items_path(path)) as staging:
                save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, staging)
        content = asdict(replace(self, per_item={}))
        del content["per_item"]
        write_json(Path(path), finite(content))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; no per_item where it is missing. Raises InputError for a malformed file, or one of another schema."""
        scores, items = cls.of(read_json(path), path), _items_path(path)
        if not items.is_file():
            return scores
        with making_sense(items, AGAIN):
            return replace(scores, per_item=_load_items(items, len(scores.values)))

    @classmethod
    def of(cls, content: Mapping[str, Any], path: str | Path) -> Self:
        """The same from the content of PATH, without per_item."""
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {content.get('schema')!r} is not the known {SCHEMA}: {AGAIN}")
        with making_sense(path, AGAIN):
            content = dict(content)
            content["profiles"] = {name: Profile(**_infinities(_tuples(entry))) for name, entry in content["profiles"].items()}
            if content.get("costs"):
                content["costs"] = LayerCosts(**_tuples(content["costs"]))
            scores = cls(**_tuples(content))
            scores.check()
            return scores

    def check(self) -> None:
        """Raise ValueError for fields that cannot belong together, or are of other types than their own."""
        check(Profiled, method=self.method, loss=self.loss, items=self.items, tokens=self.tokens, seconds=self.seconds)
        check(Profiled, confidence=self.confidence, inputs=self.inputs)
        if self.loss not in self.profiles or self.items < 1 or self.tokens < 1 or not isinstance(self.model, str):
            raise ValueError(f"loss {shown(self.loss)}, {shown(self.items)} items, {shown(self.tokens)} tokens, model {shown(self.model)}")
        for name, profile in self.profiles.items():
            columns = {"values": profile.values, "low": profile.low, "high": profile.high}
            if {len(column) for column in columns.values()} != {len(self.values)} or not self.values:
                raise ValueError(f"profiles.{name}: {', '.join(f'{len(column)} {key}' for key, column in columns.items())}")
            for key, value in [*((key, value) for key, column in columns.items() for value in column), ("base_loss", profile.base_loss)]:
                if not (isinstance(value, int | float) and not isinstance(value, bool)) and (key != "base_loss" or value is not None):
                    raise ValueError(f"profiles.{name}.{key}: {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class LayerScores(Profiled):
    """Importance of each layer; layers are selected by the primary profile.

    certificate: what a race has proven (see race.py). costs: what copies of layers take. copies: layers that are copies already, which are
    not copied again. analysis: what was computed from per_item, "stability" of the choice and "conflicts" of two corpora.
    """

    notes: tuple[str, ...] = ()
    certificate: Mapping[str, Any] | None = None
    costs: LayerCosts | None = None
    copies: tuple[int, ...] = ()
    analysis: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        check(LayerScores, copies=self.copies, notes=self.notes, certificate=self.certificate, analysis=self.analysis)
        if any(not 0 <= layer < len(self.values) for layer in self.copies):
            raise ValueError(f"copies {shown(self.copies)} among {len(self.values)} layers")
        if self.costs is not None:
            for key, value in vars(self.costs).items():
                require(f"costs.{key}", value, tuple[int, ...] if isinstance(value, tuple) else int)
            if {len(self.costs.parameters), len(self.costs.weights)} != {len(self.values)}:
                raise ValueError(f"costs of {len(self.costs.parameters)} layers, values of {len(self.values)}")

    @property
    def candidates(self) -> list[int]:
        """The layers that may be copied."""
        return [layer for layer in range(len(self.values)) if layer not in self.copies]


@dataclass(frozen=True, kw_only=True)
class UnitScores(Profiled):
    """Importance of each unit; unit i is the part `kinds[i]` of layer `layers[i]`."""

    method: str = "unit_masking"
    granularity: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]

    def check(self) -> None:
        super().check()
        check(UnitScores, granularity=self.granularity, layers=self.layers, kinds=self.kinds)
        if not len(self.layers) == len(self.kinds) == len(self.values):
            raise ValueError(f"{len(self.layers)} layers, {len(self.kinds)} kinds, {len(self.values)} values")


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists for tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _infinities(profile: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has null for a value past all others."""
    values = {key: tuple(math.inf if value is None else value for value in profile[key]) for key in ("values", "low", "high")}
    if any(value != value for each in values.values() for value in each):
        raise TypeError("it holds a NaN")
    return {**profile, **values}


def _items_path(path: str | Path) -> Path:
    """scores.json -> scores.items.safetensors."""
    return Path(path).with_suffix(".items.safetensors")


def _load_items(path: Path, columns: int) -> dict[str, ItemScores]:
    from safetensors.torch import load_file

    tensors = load_file(regular(path))
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    found = {name: ItemScores(tensors[f"{name}.sums"], tensors[f"{name}.weights"], tensors.get(f"{name}.base")) for name in names}
    for name, scores in found.items():
        items = len(scores.weights)
        shapes = {"sums": tuple(scores.sums.shape[:2]), **({} if scores.base is None else {"base": tuple(scores.base.shape)})}
        wanted = {"sums": (items, columns), "base": (items,)}
        for key, shape in shapes.items():
            if shape != wanted[key] or scores.weights.ndim != 1 or getattr(scores, key).dtype != torch.float64:
                raise ValueError(f"{name}.{key} is {getattr(scores, key).dtype} {list(shape)}, not of {items} items and {columns} values")
    return found
