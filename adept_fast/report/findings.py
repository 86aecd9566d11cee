"""Answer a reader's first questions in words, from eval.json: did it learn, what was lost, what does it look like?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adept_fast.evaluation.results import FEWEST_ITEMS, Answer, Change, EvaluationResults, Measured
from adept_fast.report.differences import tone
from adept_fast.report.numbers import interval, number, percent, signed

NOT_YET = "Not evaluated yet"
GOOD, BAD, OPEN = "good", "bad", ""


@dataclass(frozen=True)
class Finding:
    """verdict: two or three words. short: the numbers behind it. sentences: the whole answer. tone: a class of style.css"""

    verdict: str
    short: str
    sentences: tuple[str, ...] = ()
    tone: str = OPEN


def not_evaluated(results: EvaluationResults | None) -> Finding | None:
    """Say which model is still to be evaluated; None if none is."""
    found = () if results is None else results.models
    missing = [name for name in ("base", "tuned") if name not in found]
    return Finding(NOT_YET, f"to be evaluated: {' and '.join(missing)} model") if missing else None


def learnt(results: EvaluationResults | None) -> Finding:
    """Say whether the loss on the domain fell."""
    if (missing := not_evaluated(results)) or results is None or results.tuned is None:
        return missing or Finding(NOT_YET, "")
    before, after, changed = results.base.domain, results.tuned.domain, results.changes["tuned"].domain
    if before is None or after is None or changed is None:
        return Finding("Not measured", "no domain was given to the evaluation")
    how, doubt = _moved(changed.loss)
    sentences = [
        f"The loss on domain documents that were not trained on {how}, from {number(before.loss)} to {number(after.loss)} nats per token"
        f"{doubt}.",
        *_perplexity(before, after),
        *_accuracy("Domain questions", before, after, changed.accuracy),
    ]
    verdict, colour = {"better": ("Yes", GOOD), "worse": ("No", BAD), "none": ("Not shown", OPEN)}[tone(changed.loss)]
    if after.items < FEWEST_ITEMS and changed.loss.certain:
        verdict, colour = "Too few documents", OPEN
        sentences.insert(1, f"An interval of {after.items} documents decides nothing: evaluate {FEWEST_ITEMS} or more, by eval.domain.")
    return Finding(verdict, f"domain loss {_short(changed.loss)}", tuple(sentences), colour)


def lost(results: EvaluationResults | None) -> Finding:
    """Say whether general loss rose or answers got worse, in whatever was measured beside the domain."""
    if (missing := not_evaluated(results)) or results is None or results.tuned is None:
        return missing or Finding(NOT_YET, "")
    base, tuned, changes = results.base.corpora(), results.tuned.corpora(), results.changes["tuned"].corpora()
    sentences, worse = [], False
    for name, change in changes.items():
        if name == "domain":
            continue
        ours, theirs = base[name], tuned[name]
        how, doubt = _moved(change.loss)
        sentences.append(f"The loss on {name} text {how}, from {number(ours.loss)} to {number(theirs.loss)} nats per token{doubt}.")
        sentences += _accuracy(f"{name.capitalize()} questions", ours, theirs, change.accuracy)
        worse |= tone(change.loss) == "worse" or (change.accuracy is not None and tone(change.accuracy, True) == "worse")
    if results.tuned.shifted_tokens is not None:
        share = percent(results.tuned.shifted_tokens, 1)
        sentences.append(f"At {share} of the positions in general text the likeliest next token is no longer the base's.")
    metrics = [(metric.change, metric.higher_is_better) for task in results.tasks.values() for metric in task.metrics.values()]
    judged = [tone(change, higher) for change, higher in metrics if change is not None]
    if judged:
        count = judged.count("worse")
        sentences.append(f"Of {len(judged)} lm-eval results {count or 'none'} got worse beyond the interval.")
        worse |= count > 0
    short = f"general loss {_short(changes['general'].loss)}"
    if results.tuned.shifted_tokens is not None:
        short += f"; {percent(results.tuned.shifted_tokens, 1)} of general tokens shifted"
    return Finding("Something" if worse else "No loss shown", short, tuple(sentences), BAD if worse else GOOD)


def looks(answers: Sequence[Answer]) -> Finding:
    """Say how many answers differ."""
    both = [answer for answer in answers if answer.base is not None and answer.tuned is not None]
    if not both:
        return Finding(NOT_YET, "no prompts were answered by base and tuned model")
    differing = sum(answer.base != answer.tuned for answer in both)
    return Finding(f"{len(both)} prompts", f"answered by both models, {differing or 'none'} of them differently")


def _short(change: Change) -> str:
    return f"{signed(change.value)} nats per token {interval(change.low, change.high)}"


def _moved(change: Change) -> tuple[str, str]:
    """Put a change of loss into words: how it moved, and what its interval says."""
    how = f"{'fell' if change.value < 0 else 'rose'} by {number(abs(change.value))}" if change.value else "did not change"
    bounds = f"95 % interval of the difference {interval(change.low, change.high)}"
    if change.certain:
        return how, f" ({bounds})"
    rise = f"; a rise of up to {number(change.high)} is not ruled out" if change.high > 0 else ""
    return how, f" ({bounds}, which holds 0: no difference is shown{rise})"


def _perplexity(before: Measured, after: Measured) -> Iterator[str]:
    if before.perplexity is not None and after.perplexity is not None:
        words = f"{number(before.perplexity, 1)} to {number(after.perplexity, 1)}"
        yield f"Its perplexity, the number of equally likely next tokens that would be as hard to guess, went from {words}."


def _accuracy(what: str, before: Measured, after: Measured, change: Change | None) -> Iterator[str]:
    if change is not None:
        points = f"{signed(100 * change.value, 1)} points {interval(100 * change.low, 100 * change.high, 1)}"
        shares = f"{percent(before.accuracy, 1)} by the base, {percent(after.accuracy, 1)} by the tuned model"
        yield f"{what} answered right: {shares} ({points})."
