"""Put eval.json into words and a table: which losses fell or rose, and whether the difference exceeds the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from adept_fast.errors import InputError
from adept_fast.runtime.input_files import read_json
from adept_fast.settings.validation import shown

MODELS = ("base", "expanded", "tuned")
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


def check(content: Mapping[str, Any], path: Path) -> None:
    """Raise InputError unless `content` has the form of eval.json: a table a model, with numbers or the name of the model it equals."""

    def wrong(what: str, value: Any) -> InputError:
        return InputError(f"{path}: {what} is {shown(value)}: restore it, or delete it and run adept-fast eval again")

    models: Any = content.get("models")
    for key, value in (("models", models), ("inputs", content.get("inputs", {}))):
        if not isinstance(value, Mapping):
            raise wrong(key, value)
    for name, result in models.items():
        if not isinstance(result, Mapping):
            raise wrong(f"models.{name}", result)
        if "same_as" in result and result["same_as"] not in models:
            raise wrong(f"models.{name}.same_as", result["same_as"])
        if not isinstance(result.get("shifted_tokens"), float | int | None):
            raise wrong(f"models.{name}.shifted_tokens", result["shifted_tokens"])
        for corpus in ("general", "domain"):
            measured = result.get(corpus)
            if not isinstance(measured, Mapping | None):
                raise wrong(f"models.{name}.{corpus}", measured)
            for key, value in (measured or {}).items():
                if isinstance(value, bool) or not isinstance(value, int | float | None):
                    raise wrong(f"models.{name}.{corpus}.{key}", value)


def read_results(path: Path) -> dict[str, Any]:
    """Read eval.json. Raises InputError for another content."""
    content = read_json(path)
    check(content, path)
    return content


def resolve(models: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return results by model, with {"same_as": other} replaced by the other's results. Bit-equal logits shift no token."""
    found = {name: models[name] for name in MODELS if models.get(name)}
    for name, result in found.items():
        if "same_as" in result:
            found[name] = {**found.get(result["same_as"], {}), "shifted_tokens": 0.0}
    return found


def verdict(models: Mapping[str, Any]) -> str:
    """Write one sentence on tuned against base: domain loss, then general loss. Only a loss that fell counts as a gain."""
    results = resolve(models)
    if "tuned" not in results or "base" not in results:
        return f"No result yet; to be evaluated: {', '.join(name for name in ('base', 'tuned') if name not in results)}."
    parts = [_change(corpus, results["base"].get(corpus) or {}, results["tuned"].get(corpus) or {}) for corpus in ("domain", "general")]
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _change(corpus: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    before, after = base.get("loss"), tuned.get("loss")
    if not is_finite(before) or not is_finite(after):
        which = "tuned" if is_finite(before) else "base"
        return f"the {which} model's {corpus} loss was not measured or is not finite"
    old, new = number(before), number(after)
    if old == new:
        return f"{corpus} loss stayed at {old} nats per token"
    bounds = [bound for result in (base, tuned) for key in ("low", "high") if is_finite(bound := result.get(key))]
    if len(bounds) == 4:
        overlap = bounds[0] <= bounds[3] and bounds[2] <= bounds[1]
        doubt = ", a difference inside the 95 % intervals" if overlap else ""
    else:
        doubt = ", without intervals to judge the difference by"
    if corpus == "domain" and after > before:
        return f"domain loss did not fall: it rose from {old} to {new} nats per token{doubt}"
    return f"{corpus} loss {'fell' if after < before else 'rose'} from {old} to {new} nats per token{doubt}"


def table(models: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the results table, one cell a model (base, expanded, tuned), without the measures that no model has."""
    results = resolve(models)
    rows = []
    measures = (("loss", _loss), ("perplexity", _perplexity), ("accuracy", _accuracy))
    for corpus in ("general", "domain"):
        for name, measure in measures:
            rows.append(Row(f"{corpus} {name}", tuple(measure(result.get(corpus) or {}) for result in results.values())))
    rows.append(Row("shifted tokens", tuple(Cell(percent(result.get("shifted_tokens"), 2)) for result in results.values())))
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


def _loss(result: Mapping[str, Any]) -> Cell:
    return Cell(number(result.get("loss")), interval(result.get("low"), result.get("high")))


def _perplexity(result: Mapping[str, Any]) -> Cell:
    low, high = (math.exp(bound) if is_finite(bound) and bound < 700 else None for bound in (result.get("low"), result.get("high")))
    return Cell(number(result.get("perplexity"), 2), interval(low, high, 2))


def _accuracy(result: Mapping[str, Any]) -> Cell:
    low, high = result.get("accuracy_low"), result.get("accuracy_high")
    bounds = f"[{number(100 * low, 1)}, {number(100 * high, 1)}]" if is_finite(low) and is_finite(high) else ""
    return Cell(percent(result.get("accuracy"), 1), bounds)
