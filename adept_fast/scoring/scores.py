"""Results of scoring: the importance of each layer or unit with its uncertainty, for each measured loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import staged_file, write_json
from adept_fast.runtime.bootstrap import CONFIDENCE, bootstrap
from adept_fast.runtime.input_files import as_input_error, read_json, regular
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.analysis import check_analysis
from adept_fast.scoring.budget import LayerCosts
from adept_fast.scoring.profile import Profile
from adept_fast.scoring.shown_scores import Shown
from adept_fast.settings.validation import check, require, require_path, shown

SCHEMA = 1
AGAIN = "delete it to score again"


@dataclass(frozen=True)
class ItemScores:
    """Scores of single items. A layer's value is sum(sums) / sum(weights).

    sums: fp64 [items, layers] (method rank: [items, layers, kinds]); NaN if a race did not measure it, inf if no finite loss is left
    weights: fp64 [items]
    base: summed loss of the model as it is, fp64 [items], or None
    """

    sums: Tensor
    weights: Tensor
    base: Tensor | None = None

    def among(self, items: Tensor) -> ItemScores:
        """Select items by a mask, bool [items]."""
        return ItemScores(self.sums[items], self.weights[items], None if self.base is None else self.base[items])

    def profile(self, method: str, seed: int = 0) -> Profile:
        values, low, high = bootstrap(self.sums, self.weights, seed, STATISTICS.get(method))
        measured = self.base is not None and ~self.base.isnan()
        base = None if self.base is None else float(self.base[measured].sum() / self.weights[measured].sum())
        return Profile(tuple(values.tolist()), tuple(low.tolist()), tuple(high.tolist()), base)


def share_of_largest(means: Tensor) -> Tensor:
    """Divide means [n, layers] by the largest of each row."""
    return means / means.amax(-1, keepdim=True)


def mean_rank(means: Tensor) -> Tensor:
    """Compute 1 - mean over kinds of rank / layers, the highest of a kind having rank 1: [n, layers, kinds] -> [n, layers].

    NaN marks a kind that a layer does not have.
    """
    there = ~means.isnan()
    order = means.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = 1.0 + order.argsort(1).double()
    return 1 - (ranks * there).sum(2) / there.sum(2) / means.shape[1]


def require_scores(*several: object, name: str = "scores") -> None:
    """Raise InputError, under `name`, for anything that is not a LayerScores."""
    for scores in several:
        if not isinstance(scores, LayerScores):
            raise InputError(f"{name} must be what score_layers returns, found {type(scores).__name__}: score_layers(model, probe)")


STATISTICS = {"cumulative": share_of_largest, "rank": mean_rank}  # from weighted means to values; other methods use the means


@dataclass(frozen=True, kw_only=True, repr=False)
class Profiled(Shown):
    """Fields shared by the results of scoring layers and units; `LayerScores` lists them."""

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
        """Write `path` (scores.json, for example), and per_item, if any, beside it (scores.items.safetensors)."""
        from safetensors.torch import save_file

        path = require_path("path", path)
        tensors = {f"{name}.{key}": value for name, scores in self.per_item.items() for key, value in vars(scores).items()}
        if tensors:
            with staged_file(_items_path(path)) as staging:
                save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, staging)
        content = asdict(replace(self, per_item={}))
        del content["per_item"]
        write_json(Path(path), finite(content))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; per_item stays empty if its file is missing. Raises InputError for a malformed file or another schema."""
        path = require_path("path", path)
        scores, items = cls.of(read_json(path), path), _items_path(path)
        if not items.is_file():
            return scores
        with as_input_error(items, AGAIN):
            return replace(scores, per_item=_load_items(items, len(scores.values)))

    @classmethod
    def of(cls, content: Mapping[str, Any], path: str | Path) -> Self:
        """Build scores from the content of `path`, without per_item."""
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {shown(content.get('schema'))} is not the known {SCHEMA}: {AGAIN}")
        with as_input_error(path, AGAIN):
            content = dict(content)
            content["profiles"] = {name: Profile(**_infinities(_tuples(entry))) for name, entry in content["profiles"].items()}
            if content.get("costs"):
                content["costs"] = LayerCosts(**_tuples(content["costs"]))
            scores = cls(**_tuples(content))
            scores.check()
            return scores

    def check(self) -> None:
        """Raise ValueError for fields of a wrong type, and for fields that contradict each other."""
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


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerScores(Profiled):
    """Importance of each layer, the result of `score_layers`. `select_layers` chooses by the primary profile.

    `values`, `low` and `high`, each [layers], and `base_loss` are those of the primary profile.

    Args:
        method, loss: how the layers were scored, and the name of the primary profile
        profiles: loss name ("answer", "kl", "all", "domain") -> `values`, `low` and `high`, each [layers], and `base_loss`
        items, tokens: measured items, and supervised tokens in them
        seconds: wall-clock time of scoring
        model: its name or path
        inputs: what the scores were made from
        confidence: of the intervals
        per_item: scores of single items by loss name, which `save` writes to a second file
        notes: remarks for the report
        certificate: what a race has proven, or None (race.py)
        costs: sizes from which the costs of copies follow, or None (budget.py)
        copies: layers that are copies already; these are never copied again
        analysis: results computed from per_item: "stability" of the choice, "conflicts" of two corpora, "comparison" of methods

    Raises:
        InputError: from `load`, for a malformed file or another schema

    >>> scores = score_layers(model, probe)
    >>> scores.save("scores.json")
    >>> LayerScores.load("scores.json").values == scores.values
    True
    >>> list(scores.to_dataframe().columns), scores.plot(chosen=[2]).get_xlabel()
    (['answer', 'answer_low', 'answer_high'], 'layer')

    Source: ADEPT (arXiv 2510.10071), stage 1.
    """

    notes: tuple[str, ...] = ()
    certificate: Mapping[str, Any] | None = None
    costs: LayerCosts | None = None
    copies: tuple[int, ...] = ()
    analysis: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        check(LayerScores, copies=self.copies, notes=self.notes, certificate=self.certificate, analysis=self.analysis)
        check_analysis(self.analysis, len(self.values))
        if any(not 0 <= layer < len(self.values) for layer in self.copies):
            raise ValueError(f"copies {shown(self.copies)} among {len(self.values)} layers")
        if self.costs is not None:
            for key, value in vars(self.costs).items():
                require(f"costs.{key}", value, tuple[int, ...] if isinstance(value, tuple) else int)
            if {len(self.costs.parameters), len(self.costs.weights)} != {len(self.values)}:
                raise ValueError(f"costs of {len(self.costs.parameters)} layers, values of {len(self.values)}")

    @property
    def candidates(self) -> list[int]:
        """Return the layers that may be copied."""
        return [layer for layer in range(len(self.values)) if layer not in self.copies]


@dataclass(frozen=True, kw_only=True, repr=False)
class UnitScores(Profiled):
    """Importance of each unit of a layer, the result of `mask_units`. Unit i is the part `kinds[i]` of layer `layers[i]`.

    Args:
        granularity: "tensor" or "head"
        layers, kinds: layer index and part of each unit, [units]
        profiles, items, tokens, seconds, model, inputs, confidence, per_item: as of `LayerScores`, [units] for [layers]

    Raises:
        InputError: from `load`, for a malformed file or another schema

    >>> scores = mask_units(model, probe, "head", layers=[2])
    >>> scores.kinds[0], scores.layers[0]
    ('self_attn[0]', 2)

    Source: extends stage 1 of ADEPT (arXiv 2510.10071) to parts of layers.
    """

    method: str = "unit_masking"
    granularity: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]

    def row_labels(self) -> dict[str, Collection[int | str]]:
        return {"layer": self.layers, "kind": self.kinds}

    def check(self) -> None:
        super().check()
        check(UnitScores, granularity=self.granularity, layers=self.layers, kinds=self.kinds)
        if not len(self.layers) == len(self.kinds) == len(self.values):
            raise ValueError(f"{len(self.layers)} layers, {len(self.kinds)} kinds, {len(self.values)} values")


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists into tuples: JSON has none."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _infinities(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Turn null into inf: JSON has no infinity."""
    values = {key: tuple(math.inf if value is None else value for value in profile[key]) for key in ("values", "low", "high")}
    if any(value != value for each in values.values() for value in each):
        raise TypeError("it holds a NaN")
    return {**profile, **values}


def _items_path(path: str | Path) -> Path:
    """Return the path of the items' scores: scores.json -> scores.items.safetensors."""
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
