"""The content of eval.json: what base, expanded and tuned model measure, how they differ on the same items, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.input_files import as_input_error, read_json
from adept_fast.settings.typed_json import as_json, from_json
from adept_fast.settings.validation import shown

SCHEMA = 2
FEWEST_ITEMS = 6  # with fewer, a sign test is above 5 % even where all items moved the same way
AGAIN = "restore it, or delete it and run adept-fast eval again"


@dataclass(frozen=True)
class Measured:
    """What a model measures on a corpus.

    loss: nats per supervised token. low, high: its 95 % bootstrap interval over items
    perplexity: exp(loss); None if that overflows
    tokens: supervised ones
    accuracy: the share of questions whose right letter is the likeliest, with its interval; None for texts
    """

    loss: float
    low: float
    high: float
    perplexity: float | None
    tokens: int
    items: int
    accuracy: float | None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


@dataclass(frozen=True)
class Change:
    """A model's value minus the base's on the same items. low, high: 95 % interval by a bootstrap over these pairs."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Return whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class CorpusChange:
    """Changes on one corpus: of the loss, in nats per token, and of the accuracy on questions."""

    loss: Change
    accuracy: Change | None


@dataclass(frozen=True)
class ModelResult:
    """The results of one model.

    shifted_tokens: the share of positions of the general corpus whose likeliest token is not the base's; None for the base
    also: further corpora by name (eval.also)
    same_as: the model that it equals by proof, whose results these are; reason: the proof
    """

    general: Measured
    shifted_tokens: float | None
    domain: Measured | None = None
    also: Mapping[str, Measured] = field(default_factory=dict)
    same_as: str | None = None
    reason: str | None = None

    def corpora(self) -> dict[str, Measured]:
        """Return the results by corpus: general, domain, then those of eval.also."""
        return {"general": self.general, **({} if self.domain is None else {"domain": self.domain}), **self.also}


@dataclass(frozen=True)
class ModelChange:
    """One model's changes against the base, by corpus as in ModelResult."""

    general: CorpusChange
    domain: CorpusChange | None = None
    also: Mapping[str, CorpusChange] = field(default_factory=dict)

    def corpora(self) -> dict[str, CorpusChange]:
        return {"general": self.general, **({} if self.domain is None else {"domain": self.domain}), **self.also}


@dataclass(frozen=True)
class Answer:
    """A prompt with the answers of base and tuned model, None where there is no such model or its generation failed.

    from_: "domain", "general" or "eval.prompts"
    reference: how the document goes on, or the right answer; None for prompts of the recipe
    """

    prompt: str
    from_: str
    reference: str | None
    base: str | None
    tuned: str | None


@dataclass(frozen=True)
class TaskMetric:
    """A metric of an lm-eval task.

    tuned, change: None without a tuned model; a group of tasks has no change, its tasks have
    higher_is_better: as lm-eval has it, true where it does not say
    """

    base: float
    tuned: float | None
    change: Change | None
    higher_is_better: bool


@dataclass(frozen=True)
class Task:
    """An lm-eval task. items: answered by each model. metrics: by lm-eval's name, such as "acc" or "exact_match,strict-match"."""

    items: int
    metrics: Mapping[str, TaskMetric]


@dataclass(frozen=True)
class Tried:
    """The general loss at one alpha.

    loss: nats per supervised token. rise: the loss minus that at alpha 0, with its 95 % interval (low, high).
    """

    alpha: float
    loss: float
    rise: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Dial(Tried):
    """The largest alpha within a limit. domain_loss: at that alpha. tried: all that were measured."""

    limit: float
    tried: tuple[Tried, ...]
    domain_loss: float | None = None


@dataclass(frozen=True)
class EvaluationResults:
    """All of eval.json.

    models: base, expanded and tuned, as far as they exist
    changes: of each model that is not the base by proof
    tasks: lm-eval's, by name (eval.tasks)
    dial: with eval.general_limit only
    """

    models: Mapping[str, ModelResult]
    changes: Mapping[str, ModelChange]
    seconds: float
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    answers: tuple[Answer, ...] = ()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    dial: Dial | None = None

    @property
    def base(self) -> ModelResult:
        return self.models["base"]

    @property
    def tuned(self) -> ModelResult | None:
        return self.models.get("tuned")

    def corpora(self, model: str) -> dict[str, Measured]:
        """Return a model's results by corpus; nothing for a model that was not evaluated."""
        return self.models[model].corpora() if model in self.models else {}

    def save(self, path: Path) -> None:
        """Write eval.json. A model that equals another is written as {"same_as": its name, "reason": ...}."""
        content = as_json(self)
        for name, result in self.models.items():
            if result.same_as is not None:
                content["models"][name] = {"same_as": result.same_as, "reason": result.reason}
        write_json(path, {"schema": SCHEMA, **content})

    @classmethod
    def load(cls, path: Path) -> EvaluationResults:
        """Read eval.json. Raises InputError for another schema or content, which names the entry at fault."""
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path) -> EvaluationResults:
        """Build the results from the content of `path`."""
        if content.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema {shown(content.get('schema'))} is not the known {SCHEMA}: {AGAIN}")
        with as_input_error(path, AGAIN):
            rest = {key: value for key, value in content.items() if key != "schema"}
            results = from_json(cls, {**rest, "models": _resolved(rest.get("models"))})
            results._require_whole()
            return results

    def _require_whole(self) -> None:
        """Raise InputError unless every model has a change, and both are on the corpora of the base."""
        compared = {name for name, result in self.models.items() if name != "base" and result.same_as is None}
        if self.changes.keys() != compared:
            raise InputError(f"changes has {shown(sorted(self.changes))}, not {shown(sorted(compared))}")
        for table, entries in (("models", self.models), ("changes", self.changes)):
            for name, entry in entries.items():
                if entry.corpora().keys() != self.base.corpora().keys():
                    raise InputError(f"{table}.{name} has {', '.join(entry.corpora())}, not {', '.join(self.base.corpora())}")


def _resolved(models: Any) -> dict[str, Any]:
    """Give a model that equals another the other's results. Bit-equal logits shift no token."""
    if not isinstance(models, Mapping) or "base" not in models:
        raise InputError(f"models is {shown(models)}")
    found = dict(models)
    for name, entry in found.items():
        if isinstance(entry, Mapping) and "same_as" in entry:
            other = found.get(entry["same_as"])
            if not isinstance(other, Mapping) or "same_as" in other:
                raise InputError(f"models.{name}.same_as is {shown(entry['same_as'])}")
            found[name] = {**other, "shifted_tokens": 0.0, **entry}
    return found
