"""Runs to compare: read, checked to be measured alike, grouped by recipe, and compared item by item."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adept_fast.errors import InputError
from adept_fast.evaluation.paired_items import ItemLosses, load_items
from adept_fast.evaluation.results import AGAIN, CorpusChange, EvaluationResults, ModelResult
from adept_fast.report.artefacts import EVALUATION, LOG, RECIPE
from adept_fast.report.page_templates import flatten
from adept_fast.runtime.input_files import as_input_error, read_yaml
from adept_fast.tuning.training_history import TrainingHistory

MEASURED_ON = {
    "model": "another base model",
    "general": "other general items: set the same probe, eval.general and eval.max_items",
    "domain": "other domain items: set the same eval.domain, or tune.streaming for all (a stream holds out its first documents)",
}
NOT_THE_RECIPE = ("seed", "output_dir")


@dataclass(frozen=True)
class Measure:
    """title; how to read it from a model's results; the factor and the decimals that it is shown with"""

    title: str
    read: Callable[[ModelResult], float | None]
    factor: float
    digits: int


MEASURES = (
    Measure("general loss", lambda result: result.general.loss, 1, 3),
    Measure("domain loss", lambda result: None if result.domain is None else result.domain.loss, 1, 3),
    Measure("general accuracy (%)", lambda result: result.general.accuracy, 100, 1),
    Measure("domain accuracy (%)", lambda result: None if result.domain is None else result.domain.accuracy, 100, 1),
    Measure("shifted tokens (%)", lambda result: result.shifted_tokens, 100, 2),
)


@dataclass(frozen=True)
class Spread:
    """The values of one measure over the seeds of a recipe. spread: sample standard deviation, None for one seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "values": list(self.values)}


@dataclass(frozen=True)
class EvaluatedRun:
    """recipe: dotted key -> value, without seed and output_dir. items: model -> corpus -> losses of each item"""

    folder: Path
    seed: int
    recipe: Mapping[str, str]
    results: EvaluationResults
    items: Mapping[str, Mapping[str, ItemLosses]]
    history: TrainingHistory


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, which differ in their seeds."""

    name: str
    runs: tuple[EvaluatedRun, ...]

    @cached_property
    def measures(self) -> dict[str, Spread]:
        return measures([run.results.models["tuned"] for run in self.runs])

    @cached_property
    def against_base(self) -> dict[str, CorpusChange]:
        """Return the change from the base by corpus."""
        return _changes(_mean([run.items["tuned"] for run in self.runs]), self.runs[0].items["base"])

    def against(self, other: Group) -> dict[str, CorpusChange]:
        """Return the change from another group by corpus, each the mean over its seeds."""
        return _changes(*(_mean([run.items["tuned"] for run in group.runs]) for group in (self, other)))

    @property
    def place(self) -> tuple[float, float]:
        """Return the changes of domain and general loss from the base."""
        return self.against_base["domain"].loss.value, self.against_base["general"].loss.value

    @property
    def tokens(self) -> int | None:
        """Return how many tokens the runs were trained on, as planned."""
        tokens = self.runs[0].history.plan.get("tokens")
        return None if tokens is None else int(tokens)

    @property
    def speed(self) -> float | None:
        """Return the mean over seeds of the median tokens per second."""
        speeds = [run.history.speed for run in self.runs if run.history.speed is not None]
        return statistics.fmean(speeds) if speeds else None


def load_run(folder: Path) -> EvaluatedRun:
    """Read an output_dir. Raises InputError for one that holds no run that was evaluated to the end."""
    evaluation, recipe = folder / EVALUATION, folder / RECIPE
    for path in (evaluation, recipe):
        if not path.is_file():
            raise InputError(f"{path}: missing: {folder} holds no run that has ended: adept-fast run ends it")
    results, settings = EvaluationResults.load(evaluation), read_yaml(recipe)
    if results.tuned is None or results.base.domain is None or results.tuned.domain is None:
        raise InputError(f"{evaluation}: holds no results of base and tuned model on general and domain items: run adept-fast eval")
    with as_input_error(recipe, "restore it, or run adept-fast run again, which keeps it"):
        flat, seed = {key: value for key, value in flatten(settings) if key not in NOT_THE_RECIPE}, int(settings.get("seed", 0))
    return EvaluatedRun(folder, seed, flat, results, load_items(evaluation, results), TrainingHistory.load(folder / LOG))


def grouped(runs: Sequence[EvaluatedRun]) -> list[Group]:
    """Group runs by recipe. Raises InputError for runs that were measured on different items, and for a seed that comes twice."""
    for run in runs[1:]:
        for key, what in MEASURED_ON.items():
            if run.results.inputs.get(key) != runs[0].results.inputs.get(key):
                files = f"{run.folder / EVALUATION} cannot be compared with {runs[0].folder / EVALUATION}"
                raise InputError(f"{files}: measured with {what}")
        for corpus in ("general", "domain"):
            ours, theirs = (each.items["tuned"][corpus].tokens for each in (run, runs[0]))
            if not torch.equal(ours, theirs):
                raise InputError(f"{run.folder / EVALUATION}: its {corpus} items have other tokens than those of {runs[0].folder}: {AGAIN}")
    members: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        members.setdefault(json.dumps(run.recipe, sort_keys=True), []).append(run)
    names = _names([group[0].recipe for group in members.values()])
    groups = [Group(name, tuple(group)) for name, group in zip(names, members.values(), strict=True)]
    for group in groups:
        if len({run.seed for run in group.runs}) < len(group.runs):
            raise InputError(f"{group.runs[0].folder} and another run of {group.name} have the same seed: a run counts once")
    return groups


def measures(results: Sequence[ModelResult]) -> dict[str, Spread]:
    """Return the measures that all results have, over them."""
    found = {measure.title: (measure.factor, [measure.read(result) for result in results]) for measure in MEASURES}
    return {
        title: Spread(tuple(factor * value for value in values if value is not None))
        for title, (factor, values) in found.items()
        if None not in values
    }


def _names(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Name each recipe by its method and the settings in which recipes of that method differ."""
    names = []
    for recipe in recipes:
        method = recipe.get("method", "adept")
        same_method = [other for other in recipes if other.get("method", "adept") == method]
        keys = sorted({key for other in same_method for key in other})
        differing = [key for key in keys if len({other.get(key) for other in same_method}) > 1]
        names.append(" ".join([method, *(f"{key}={recipe.get(key, 'null')}" for key in differing)]))
    return names


def _mean(seeds: Sequence[Mapping[str, ItemLosses]]) -> dict[str, ItemLosses]:
    """Average the losses of each item over the seeds."""
    found = {}
    for corpus in seeds[0]:
        each = [items[corpus] for items in seeds if corpus in items]
        asked = [losses.right for losses in each if losses.right is not None]
        right = torch.stack(asked).mean(0) if len(asked) == len(each) else None
        found[corpus] = ItemLosses(torch.stack([losses.sums for losses in each]).mean(0), each[0].tokens, right)
    return found


def _changes(ours: Mapping[str, ItemLosses], theirs: Mapping[str, ItemLosses]) -> dict[str, CorpusChange]:
    return {corpus: losses.change(theirs[corpus]) for corpus, losses in ours.items() if corpus in theirs}
