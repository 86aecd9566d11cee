"""Put eval.json into words and a table: which losses fell or rose, and whether the interval of the change leaves out 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from adept_fast.evaluation.results import EvaluationResults, Measured

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    title: str
    cells: tuple[Cell, ...]


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Format a number with fixed decimals; None gives a dash, NaN and infinity "not finite"."""
    if value is None:
        return NONE
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}") if is_finite(value) else "not finite"


def interval(low: Any, high: Any, digits: int = 3) -> str:
    return f"[{number(low, digits)}, {number(high, digits)}]" if is_finite(low) and is_finite(high) else ""


def percent(value: Any, digits: int) -> str:
    return f"{number(100 * value, digits)} %" if is_finite(value) else number(value)


def verdict(results: EvaluationResults | None) -> str:
    """Write one sentence on tuned against base: domain loss, then general loss. Only a loss that fell counts as a gain."""
    if results is None or results.tuned is None:
        return f"No result yet; to be evaluated: {'base, tuned' if results is None else 'tuned'}."
    parts = [_change(corpus, results) for corpus in ("domain", "general")]
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _change(corpus: str, results: EvaluationResults) -> str:
    before, after = (results.corpora(name).get(corpus) for name in ("base", "tuned"))
    if before is None or after is None:
        return f"{corpus} loss was not measured"
    old, new = number(before.loss), number(after.loss)
    if old == new:
        return f"{corpus} loss stayed at {old} nats per token"
    change = results.changes["tuned"].corpora()[corpus].loss
    doubt = "" if change.certain else f", a change whose 95 % interval {interval(change.low, change.high)} includes 0"
    if corpus == "domain" and change.value > 0:
        return f"domain loss did not fall: it rose from {old} to {new} nats per token{doubt}"
    return f"{corpus} loss {'fell' if change.value < 0 else 'rose'} from {old} to {new} nats per token{doubt}"


def table(results: EvaluationResults | None) -> list[Row]:
    """Return the rows of the results table, one cell a model (base, expanded, tuned), without the measures that no model has."""
    if results is None:
        return []
    rows = []
    measures = (("loss", _loss), ("perplexity", _perplexity), ("accuracy", _accuracy))
    for corpus in results.base.corpora():
        for name, measure in measures:
            cells = (each.corpora().get(corpus) for each in results.models.values())
            rows.append(Row(f"{corpus} {name}", tuple(Cell(NONE) if each is None else measure(each) for each in cells)))
    rows.append(Row("shifted tokens", tuple(Cell(percent(result.shifted_tokens, 2)) for result in results.models.values())))
    return [row for row in rows if any(cell.value != NONE for cell in row.cells)]


def next_copy(selection: Mapping[str, Any]) -> str:
    """Write what the copies take of full training, and what one more copy would add; empty where the record does not say."""
    shares, following = selection.get("shares"), selection.get("next")
    if not shares:
        return ""
    taken = f"{percent(shares['parameters'], 1)} of the parameters and {percent(shares['time'], 0)} of the time"
    sentence = f"The copies take {taken} of full training (modelled)."
    if following and following["joins"]:
        scores = ", ".join(f"{layer} (score {number(score)})" for layer, score in zip(following["joins"], following["scores"], strict=True))
        more = following["shares"]
        sentence += f" One more copy would add {scores} and take {percent(more['parameters'], 1)} and {percent(more['time'], 0)}."
    return sentence


def _loss(result: Measured) -> Cell:
    return Cell(number(result.loss), interval(result.low, result.high))


def _perplexity(result: Measured) -> Cell:
    low, high = (math.exp(bound) if bound < 700 else None for bound in (result.low, result.high))
    return Cell(number(result.perplexity, 2), interval(low, high, 2))


def _accuracy(result: Measured) -> Cell:
    low, high = result.accuracy_low, result.accuracy_high
    bounds = f"[{number(100 * low, 1)}, {number(100 * high, 1)}]" if low is not None and high is not None else ""
    return Cell(percent(result.accuracy, 1), bounds)
