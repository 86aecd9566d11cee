"""The k layers of lowest importance by a race: candidates are measured on growing parts of the corpus and dropped as they are decided.

The corpus is finite, and its items are measured in random order, without replacement. With x_i = items * d_i / tokens, d_i the loss
difference of a layer summed over item i and tokens those of the whole corpus, a layer's importance is exactly the mean of x over the
corpus. For two layers i, j let y be the difference of their x, its linear regression on the items' token counts (whose corpus mean is
known) taken off. For a fixed slope

    M_n = sum over the first n items of (y - mean) / (N - n),    a martingale, of variance s^2 n / (N (N - n)) after n of N items,

so its one-sided normal-mixture boundary holds at all n at once (Howard, Ramdas, McAuliffe, Sekhon, Annals of Statistics 2021,
arXiv 1810.08240; sampling without replacement: Waudby-Smith and Ramdas, arXiv 2006.04347), with a share of the error for each ordered pair.
It shrinks to 0 as n nears N, where the answer is exact. Peeking after each part is therefore safe.

Assumption: slope and variance s^2 are estimated from the items measured so far, as asymptotic confidence sequences do
(Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, arXiv 2103.06476): the bound is exact for Gaussian differences of known variance and holds
for others as n grows, which is why the first part has 32 items. The regret is meant over the given corpus, not over what it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adept_fast.scoring.settings import Score, Selection
from adept_fast.settings.validation import Range, check, require


@dataclass(frozen=True)
class Race:
    """Stop when the chosen k layers lose at most `regret` nats a token more than the best k (sum over layers), at `confidence`.

    first: items of the first part; growth: how many times as many items each later look has.
    """

    k: int = Selection.k
    regret: float = 0.04
    confidence: float = Score.confidence
    first: int = 32
    growth: float = 1.25

    def check(self, candidates: int) -> None:
        require("k", self.k, int, Range(1, candidates - 1, why="one below the layers that a race can choose from"))
        check(Score, needed=True, regret=self.regret, confidence=self.confidence)
        require("first", self.first, int, Range(8))
        require("growth", self.growth, float, Range(1, above=True))


@dataclass(frozen=True)
class Outcome:
    """layers: the chosen, ascending. undecided: those in and out of them that the race could not tell apart. items: how many were measured
    before the race stopped; measured: on how many of them each layer was; bound: on the regret, nats per token."""

    layers: tuple[int, ...]
    undecided: tuple[int, ...]
    items: int
    measured: tuple[int, ...]
    bound: float


def boundary(measured: int, items: int, alpha: float) -> float:
    """Radius, in standard deviations, of a one-sided confidence sequence for the mean of `items` after `measured` of them."""
    if measured >= items:
        return 0.0
    time = measured / (items * (items - measured))
    tuned = 1 / (3 * items)  # tightest after a quarter of the items
    scale = tuned / (2 * math.log(1 / alpha) + math.log1p(2 * math.log(1 / alpha)))
    grown = time + scale
    bound = math.sqrt(2 * grown * math.log1p(math.sqrt(grown / scale) / (2 * alpha)))
    return bound * (items - measured) / measured


def upper_bounds(values: Tensor, tokens: Tensor, items: int, mean_tokens: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Estimates of the means over the corpus [layers], and upper bounds of their differences [layers, layers] (row minus column).

    values: x of the measured items, fp64 [measured, layers]; tokens: theirs [measured]; mean_tokens: over all `items`.
    """
    if bool(values.isinf().any()):
        return _with_endless(values, tokens, items, mean_tokens, alpha)
    measured = len(values)
    centred = tokens.double() - tokens.double().mean()
    spread = float(centred.square().sum())
    slopes = (centred @ values) / spread if spread else torch.zeros(values.shape[1], dtype=torch.float64)
    means = values.mean(0) - slopes * (float(tokens.double().mean()) - mean_tokens)
    residuals = values - values.mean(0) - centred[:, None] * slopes
    covariance = residuals.T @ residuals / max(1, measured - 2)
    variance = covariance.diag()[:, None] + covariance.diag() - 2 * covariance
    return means, means[:, None] - means + boundary(measured, items, alpha) * variance.clamp_min(0).sqrt()


def _with_endless(values: Tensor, tokens: Tensor, items: int, mean_tokens: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The same where some layers have an infinite x: their mean is, and they are surely above all others, not apart from each other."""
    endless = values.isinf().any(0)
    means, upper = upper_bounds(values.where(~endless, 0.0), tokens, items, mean_tokens, alpha)
    upper[:, endless] = -torch.inf
    upper[endless] = torch.inf
    upper[endless[:, None] & endless] = 0.0
    return means.where(~endless, torch.inf), upper


def regret_bound(upper: Tensor, chosen: Sequence[int], others: Sequence[int]) -> float:
    """Bound on sum(chosen) - sum(best): each exchange of a chosen layer for another gains at most upper[chosen, other].

    An optimal exchange pairs each layer once, so it gains neither more than each chosen layer's best partner nor than each other's.
    """
    if not chosen or not others:
        return 0.0
    gains = upper[list(chosen)][:, list(others)].clamp_min(0)
    best = gains.amax(0).sort(descending=True).values[: len(chosen)]
    return min(float(gains.amax(1).sum()), float(best.sum()))


def run(
    race: Race,
    tokens: Tensor,
    layers: int,
    measure: Callable[[Sequence[int], Sequence[int]], Tensor],
    seed: int,
    copies: Collection[int] = (),
) -> Outcome:
    """Race `layers` layers over a corpus of items with so many tokens each; of them `copies` are no candidates: measured at first alone.

    measure(items, layers): the summed loss differences of those items, fp64 [items, all layers], of which only `layers` are read.
    """
    racing = [layer for layer in range(layers) if layer not in copies]
    candidates = len(racing)
    race.check(candidates)
    items, total = len(tokens), float(tokens.sum())
    order = item_order(items, seed)
    alpha = (1 - race.confidence) / (candidates * (candidates - 1))
    upper = torch.full((layers, layers), torch.inf, dtype=torch.float64)
    inside: list[int] = []
    measured = [min(race.first, items)] * layers
    done, look = 0, min(race.first, items)
    found = torch.empty(0, layers, dtype=torch.float64)
    while True:
        found = torch.cat([found, measure(order[done:look], racing if done else range(layers))])
        done = look
        values = found[:, racing] * (items / total)
        means, bounds = upper_bounds(values, tokens[order[:done]], items, total / items, alpha)
        at = torch.tensor(racing)
        upper[at[:, None], at] = torch.minimum(upper[at[:, None], at], bounds)
        for layer in racing:
            measured[layer] = done
        below = upper < 0  # row surely below column
        ranked = [racing[place] for place in means.argsort(stable=True).tolist()]
        places = race.k - len(inside)
        lowest, higher = ranked[:places], ranked[places:]
        chosen = [layer for layer in lowest if int(below[layer].sum()) < candidates - race.k]  # the others are surely in
        others = [layer for layer in higher if int(below[:, layer].sum()) < race.k]  # the others are surely out
        inside += [layer for layer in lowest if layer not in chosen]
        racing = sorted([*chosen, *others])
        bound = 0.0 if done == items else regret_bound(upper, chosen, others)
        if bound <= race.regret:
            undecided = () if done == items or bound == 0 else tuple(sorted([*chosen, *others]))
            return Outcome(tuple(sorted([*inside, *chosen])), undecided, done, tuple(measured), bound)
        look = min(items, max(done + 1, math.ceil(done * race.growth)))


def item_order(items: int, seed: int) -> list[int]:
    return torch.randperm(items, generator=torch.Generator().manual_seed(seed)).tolist()


def certificate(race: Race, outcome: Outcome, tokens: Tensor, seed: int, cost_share: float) -> dict[str, Any]:
    """What scores.json says of a race. cost_share: its cost over that of measuring all layers on all items."""
    order = item_order(len(tokens), seed)[: outcome.items]
    return {
        "k": race.k,
        "layers": list(outcome.layers),
        "regret_asked": race.regret,
        "regret_bound": outcome.bound,
        "confidence": race.confidence,
        "items_used": outcome.items,
        "items": len(tokens),
        "tokens_used": int(tokens[order].sum()),
        "tokens": int(tokens.sum()),
        "cost_share": cost_share,
        "undecided": list(outcome.undecided),
        "measured_items": list(outcome.measured),
    }


def certified(certificate: Mapping[str, Any]) -> str:
    """A certificate in one line."""
    names = {key: ", ".join(map(str, certificate[key])) for key in ("layers", "undecided")}
    return (
        f"layers {names['layers']} lose at most {certificate['regret_bound']:.3f} nats per token more than the best {certificate['k']}, "
        f"at {certificate['confidence']:.0%} confidence; {certificate['items_used']} of {certificate['items']} items, "
        f"{certificate['cost_share']:.0%} of the full cost" + (f"; not told apart: {names['undecided']}" if names["undecided"] else "")
    )
