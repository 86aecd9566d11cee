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
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.budget import LayerCosts

SCHEMA = 1


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
        content = read_json(Path(path))
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {content.get('schema')!r} is not the known {SCHEMA}: delete it to score again")
        try:
            content["profiles"] = {name: Profile(**_infinities(_tuples(entry))) for name, entry in content["profiles"].items()}
            if content.get("costs"):
                content["costs"] = LayerCosts(**_tuples(content["costs"]))
            return cls(per_item=_load_items(_items_path(path)), **_tuples(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not {cls.__name__} ({error}): delete it to score again") from None


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


def _load_items(path: Path) -> dict[str, ItemScores]:
    if not path.is_file():
        return {}
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    return {name: ItemScores(tensors[f"{name}.sums"], tensors[f"{name}.weights"], tensors.get(f"{name}.base")) for name in names}
