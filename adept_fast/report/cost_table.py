"""List what a run took: time, memory, tokens, and its share of full training."""

from __future__ import annotations

from collections.abc import Iterator

from adept_fast.report.artefacts import Artefacts, Shares
from adept_fast.report.numbers import duration, number, percent
from adept_fast.tuning.training_history import TrainingHistory


def costs(found: Artefacts) -> Iterator[tuple[str, str]]:
    """Yield (what, how much)."""
    if (scores := found.scores) is not None:
        yield "Scoring", f"{duration(scores.seconds)} for {scores.items:,} items, {scores.tokens:,} supervised tokens"
    yield from _tuning(found.history)
    if found.evaluation is not None:
        yield "Evaluation", duration(found.evaluation.seconds)
    if found.record is not None and found.record.parameters.keys() >= {"total", "trainable"}:
        total, trainable = found.record.parameters["total"], found.record.parameters["trainable"]
        yield "Parameters that train", f"{trainable:,} of {total:,} ({percent(trainable / total, 1)})"
    if (shares := found.selection.shares) is not None:
        yield "Share of full training", f"{_taken(shares)} (modelled)"
        following = found.selection.next
        if following is not None and following.joins:
            scored = (f"{layer} (score {number(score)})" for layer, score in zip(following.joins, following.scores, strict=True))
            yield "With one more copy", f"would add layer {', '.join(scored)}: {_taken(following.shares)}"


def _taken(shares: Shares) -> str:
    return f"{percent(shares.parameters, 1)} of the parameters, {percent(shares.time, 0)} of the time"


def _tuning(history: TrainingHistory) -> Iterator[tuple[str, str]]:
    plan, speed = history.plan, history.speed
    if plan:
        epochs = f", {plan['epochs']:.2f} epochs" if "epochs" in plan else ""
        yield "Tuning, planned", f"{plan.get('steps', 0):,} steps, {plan.get('tokens', 0):,} tokens{epochs}"
        skipped = f", {history.skipped:,} skipped (gradients not finite)" if history.skipped else ""
        yield "Tuning, done", f"{history.done:,} steps" + skipped + ("" if history.ended else " (not finished)")
    if history.seconds is not None:
        yield "Tuning time", duration(history.seconds)
    elif speed is not None and plan.get("tokens") and plan.get("steps"):
        tokens = plan["tokens"] * history.done / plan["steps"]
        yield "Tuning time", f"about {duration(tokens / speed)} (tokens / median speed)"
    if speed is not None:
        yield "Training speed", f"{speed:,.0f} tokens/s (median)"
    if history.peak_memory is not None:
        yield "Peak memory of tuning", f"{history.peak_memory / 2**30:.2f} GiB"
