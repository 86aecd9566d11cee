"""Lay out eval.json as tables: a row a measure, a column a model, and the paired difference of the tuned model from the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from adept_fast.evaluation.results import Change, EvaluationResults, Measured
from adept_fast.report.numbers import interval, number, percent, signed


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str = ""


EMPTY = Cell(number(None))


@dataclass(frozen=True)
class Row:
    """cells: of each model, then the difference."""

    title: str
    detail: str
    cells: tuple[Cell, ...]


def columns(results: EvaluationResults) -> list[str]:
    """Name the models with results of their own."""
    return [name for name, result in results.models.items() if result.same_as is None]


def corpus_rows(results: EvaluationResults, corpus: str) -> Iterator[Row]:
    """Yield the rows of a corpus: loss, perplexity, and for questions accuracy."""
    measured = [results.corpora(name).get(corpus) for name in columns(results)]
    first = next((found for found in measured if found is not None), None)
    if first is None:
        return
    changes = results.changes.get("tuned")
    change = None if changes is None else changes.corpora().get(corpus)
    losses = *(EMPTY if found is None else _loss(found) for found in measured), EMPTY if change is None else _difference(change.loss)
    yield Row(f"{corpus} loss", "", losses)
    yield Row(f"{corpus} perplexity", "", (*(EMPTY if found is None else _perplexity(found) for found in measured), Cell("")))
    if any(found is not None and found.accuracy is not None for found in measured):
        accuracies = (EMPTY if found is None else _accuracy(found) for found in measured)
        yield Row(f"{corpus} accuracy", "", (*accuracies, _points(None if change is None else change.accuracy)))


def sizes(results: EvaluationResults, corpora: Iterable[str]) -> str:
    """Write how much was measured: "Loss in nats per token; domain: 10 items, 2,062 tokens" """
    measured = {name: found for name, found in results.base.corpora().items() if name in corpora}
    parts = (f"{name}: {found.items:,} items, {found.tokens:,} tokens" for name, found in measured.items())
    return f"Loss in nats per token; {'; '.join(parts)}"


def shifted_row(results: EvaluationResults) -> Row:
    """Return the row of shifted tokens."""
    shares = (Cell(percent(results.models[name].shifted_tokens, 2)) for name in columns(results))
    return Row("shifted tokens", "", (*shares, Cell("")))


def task_rows(results: EvaluationResults) -> Iterator[Row]:
    """Yield the rows of the lm-eval tasks, with the cells of base and tuned model."""
    for name, task in results.tasks.items():
        for metric, found in task.metrics.items():
            better = "higher" if found.higher_is_better else "lower"
            largest = max(abs(found.base), abs(found.tuned or 0))
            digits = max(0, 4 - len(f"{largest:.0f}"))  # 0.364, but 7,071
            change = EMPTY if found.change is None else _difference(found.change, digits)
            cells = Cell(number(found.base, digits)), Cell(number(found.tuned, digits)), change
            yield Row(f"{name}: {metric}", f"{task.items:,} items; {better} is better", cells)


def _loss(found: Measured) -> Cell:
    return Cell(number(found.loss), interval(found.low, found.high))


def _perplexity(found: Measured) -> Cell:
    low, high = (math.exp(bound) if bound < 700 else None for bound in (found.low, found.high))
    return Cell(number(found.perplexity, 2), interval(low, high, 2))


def _accuracy(found: Measured) -> Cell:
    low, high = ((None if bound is None else 100 * bound) for bound in (found.accuracy_low, found.accuracy_high))
    return Cell(percent(found.accuracy, 1), interval(low, high, 1))


def _difference(change: Change, digits: int = 3) -> Cell:
    return Cell(signed(change.value, digits), interval(change.low, change.high, digits))


def _points(change: Change | None) -> Cell:
    if change is None:
        return EMPTY
    return Cell(f"{signed(100 * change.value, 1)} points", interval(100 * change.low, 100 * change.high, 1))
