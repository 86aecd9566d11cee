"""Find the k layers of lowest importance by a race: measure candidates on growing parts of the corpus, and drop each once it is decided.

The corpus is finite. Its items are measured in random order, without replacement. Let x_i = items * d_i / tokens, with d_i the loss
difference of a layer summed over item i, and tokens those of the whole corpus. A layer's importance is then the mean of x over the corpus.
For two layers let y be the difference of their x, minus its linear regression on the items' token counts, whose corpus mean is known.
For a fixed slope

    M_n = sum over the first n items of (y - mean) / (N - n)    is a martingale of variance s^2 n / (N (N - n)) after n of N items.

Its one-sided normal-mixture boundary therefore holds at all n at once (Howard, Ramdas, McAuliffe, Sekhon, Annals of Statistics 2021,
arXiv 1810.08240; sampling without replacement: Waudby-Smith and Ramdas, arXiv 2006.04347), and looking after each part is safe. Each
ordered pair gets an equal part of the error probability. The boundary shrinks to 0 as n approaches N, where the answer is exact.

Assumption: slope and variance s^2 are estimated from the items measured so far, as in asymptotic confidence sequences
(Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, arXiv 2103.06476). The bound is exact for Gaussian differences of known variance and holds
for others as n grows, so the first part has 32 items. Regret refers to the given corpus, not to the distribution it was drawn from.
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
    """Settings of a race for the k layers of lowest importance, an argument of `score_layers`.

    Args:
        k: layers to find, from 1 to one below the number of candidates
        regret: stop once the chosen layers lose at most so many nats per token more than the best k, summed over layers
        confidence: probability with which that holds, from 0.5 to below 1
        first: items of the first part, 8 or more
        growth: factor by which the number of measured items grows from look to look, above 1

    Raises:
        InputError: from `score_layers`, for a field out of these bounds

    >>> scores = score_layers(model, probe, race=Race(k=2, regret=0.1, first=8))
    >>> select_layers(scores, k=2) == scores.certificate["layers"]
    True

    Source: the papers named in this module's docstring.
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
    """The result of a race.

    layers: the chosen ones, ascending
    undecided: layers, chosen or not, that the race could not separate
    items: how many were measured before the race stopped
    measured: on how many of them each layer was measured
    bound: on the regret, nats per token
    """

    layers: tuple[int, ...]
    undecided: tuple[int, ...]
    items: int
    measured: tuple[int, ...]
    bound: float


def boundary(measured: int, items: int, alpha: float) -> float:
    """Return the radius, in standard deviations, of a one-sided confidence sequence for the mean of `items` after `measured` of them."""
    if measured >= items:
        return 0.0
    time = measured / (items * (items - measured))
    tuned = 1 / (3 * items)  # tightest after a quarter of the items
    scale = tuned / (2 * math.log(1 / alpha) + math.log1p(2 * math.log(1 / alpha)))
    grown = time + scale
    bound = math.sqrt(2 * grown * math.log1p(math.sqrt(grown / scale) / (2 * alpha)))
    return bound * (items - measured) / measured


def upper_bounds(values: Tensor, tokens: Tensor, items: int, mean_tokens: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Estimate the means over the corpus, [layers], and upper bounds of their differences, [layers, layers] (row minus column).

    values: x of the measured items, fp64 [measured, layers]
    tokens: of the measured items, [measured]
    mean_tokens: mean over all `items`
    """
    if bool(values.isinf().any()):
        return _infinite_bounds(values, tokens, items, mean_tokens, alpha)
    measured = len(values)
    centred = tokens.double() - tokens.double().mean()
    spread = float(centred.square().sum())
    slopes = (centred @ values) / spread if spread else torch.zeros(values.shape[1], dtype=torch.float64)
    means = values.mean(0) - slopes * (float(tokens.double().mean()) - mean_tokens)
    residuals = values - values.mean(0) - centred[:, None] * slopes
    covariance = residuals.T @ residuals / max(1, measured - 2)
    variance = covariance.diag()[:, None] + covariance.diag() - 2 * covariance
    return means, means[:, None] - means + boundary(measured, items, alpha) * variance.clamp_min(0).sqrt()


def _infinite_bounds(values: Tensor, tokens: Tensor, items: int, mean_tokens: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Do the same if some x are infinite: the mean of such a layer is infinite, surely above all finite ones, equal to the others."""
    infinite = values.isinf().any(0)
    means, upper = upper_bounds(values.where(~infinite, 0.0), tokens, items, mean_tokens, alpha)
    upper[:, infinite] = -torch.inf
    upper[infinite] = torch.inf
    upper[infinite[:, None] & infinite] = 0.0
    return means.where(~infinite, torch.inf), upper


def regret_bound(upper: Tensor, chosen: Sequence[int], others: Sequence[int]) -> float:
    """Bound sum(chosen) - sum(best). Exchanging a chosen layer for another gains at most upper[chosen, other].

    An optimal exchange pairs each layer once. So it gains at most the sum over chosen layers of their best partner's gain, and at most the
    same sum over the other layers.
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
    """Race `layers` layers over a corpus.

    tokens: of each item of the corpus
    measure(items, layers): summed loss differences of those items, fp64 [items, all layers], of which only `layers` are read
    copies: layers that are no candidates; they are measured in the first part only
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
    """Build the entry of a race in scores.json. cost_share: its cost relative to measuring all layers on all items."""
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
    """Format a certificate in one line."""
    names = {key: ", ".join(map(str, certificate[key])) for key in ("layers", "undecided")}
    return (
        f"layers {names['layers']} lose at most {certificate['regret_bound']:.3f} nats per token more than the best {certificate['k']}, "
        f"at {certificate['confidence']:.0%} confidence; {certificate['items_used']} of {certificate['items']} items, "
        f"{certificate['cost_share']:.0%} of the full cost" + (f"; not told apart: {names['undecided']}" if names["undecided"] else "")
    )
