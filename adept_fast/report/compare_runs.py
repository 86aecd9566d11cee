"""Compare runs: general against domain loss by recipe, with mean and spread over seeds, in compare.html and compare.json."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast.errors import InputError
from adept_fast.evaluation.results import EvaluationResults, ModelResult
from adept_fast.report.drawing import BLUE, GREY, VERMILION, WIDTH, style, to_svg
from adept_fast.report.page import flatten, render
from adept_fast.report.results import number
from adept_fast.runtime.atomic_files import write_json, write_text
from adept_fast.runtime.input_files import as_input_error, read_yaml
from adept_fast.settings.validation import require_path
from adept_fast.tuning.trainer_log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MEASURED_ON = {
    "model": "another base model",
    "general": "other general items: set the same probe, eval.general and eval.max_items",
    "domain": "other domain items: set the same eval.domain, or tune.streaming for all (a stream holds out its first documents)",
}
NOT_THE_RECIPE = ("seed", "output_dir")
COLOURS = (VERMILION, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
MEASURES = (  # title, how to read it from a model's results, factor, decimals
    ("general loss", lambda result: result.general.loss, 1, 3),
    ("domain loss", lambda result: result.domain.loss, 1, 3),
    ("general accuracy (%)", lambda result: result.general.accuracy, 100, 1),
    ("domain accuracy (%)", lambda result: result.domain.accuracy, 100, 1),
    ("shifted tokens (%)", lambda result: result.shifted_tokens, 100, 2),
)


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluated run. recipe: dotted key -> value, without seed and output_dir. tokens: trained on. speed: median tokens/s."""

    folder: Path
    seed: int
    recipe: Mapping[str, str]
    evaluation: EvaluationResults
    tokens: int | None
    speed: float | None


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


def compare(folders: Sequence[str | Path], target: str | Path) -> Path:
    """Write compare.json and compare.html of evaluated output_dirs to the folder `target`, and return the page's path.

    Runs whose recipes differ only in the seed share a row. The losses of each row are logged. Raises InputError for a folder
    without a result, fewer than two runs, and runs that were measured on different items.
    """
    runs = [_load(Path(os.path.expanduser(folder))) for folder in dict.fromkeys(map(str, folders))]
    if len(runs) < 2:
        raise InputError("compare needs two output_dirs or more: adept-fast compare out/a out/b")
    for run in runs[1:]:
        for key, what in MEASURED_ON.items():
            if run.evaluation.inputs.get(key) != runs[0].evaluation.inputs.get(key):
                files = f"{run.folder / 'eval.json'} cannot be compared with {runs[0].folder / 'eval.json'}"
                raise InputError(f"{files}: measured with {what}")
    groups: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.recipe, sort_keys=True), []).append(run)
    names = _names([members[0].recipe for members in groups.values()])
    for name, members in zip(names, groups.values(), strict=True):
        if len({run.seed for run in members}) < len(members):
            raise InputError(f"{members[0].folder} and another run of {name} have the same seed: a run counts once")
    rows = {"base": _measures([runs[0].evaluation.base])} | {
        name: _measures([run.evaluation.models["tuned"] for run in members])
        for name, members in zip(names, groups.values(), strict=True)
    }
    details = {
        name: {
            "seeds": [run.seed for run in members],
            "folders": [str(run.folder) for run in members],
            "tokens": members[0].tokens,
            "tokens_per_second": statistics.fmean(speeds) if (speeds := [run.speed for run in members if run.speed]) else None,
        }
        for name, members in zip(names, groups.values(), strict=True)
    }
    for name, row in rows.items():
        losses = zip(MEASURES[:2], _cells(row), strict=False)
        logger.info(f"{name}: {', '.join(' '.join(filter(None, (title, *cell))) for (title, *_), cell in losses)} nats per token")
    target = require_path("target", target)
    content = {name: details.get(name, {}) | {title: spread.as_dict() for title, spread in row.items()} for name, row in rows.items()}
    write_json(target / "compare.json", {"schema": 1, "rows": content})
    page = target / "compare.html"
    write_text(page, _page(rows, details))
    return page


def _load(folder: Path) -> EvaluatedRun:
    evaluation, resolved = folder / "eval.json", folder / "recipe.yaml"
    for path in (evaluation, resolved):
        if not path.is_file():
            raise InputError(f"{path}: missing: {folder} holds no run that has ended: adept-fast run ends it")
    content, recipe = EvaluationResults.load(evaluation), read_yaml(resolved)
    if not all("domain" in content.corpora(name) for name in ("base", "tuned")):
        raise InputError(f"{evaluation}: holds no results of base and tuned model on general and domain items: run adept-fast eval")
    log = read_log(folder / "trainer_log.jsonl")
    tokens = next((entry.get("tokens") for entry in reversed(log) if entry.get("event") == "plan"), None)
    speeds = [entry["tokens_per_second"] for entry in log if entry.get("tokens_per_second")]
    with as_input_error(resolved, "restore it, or run adept-fast run again, which keeps it"):
        settings, seed = {key: value for key, value in flatten(recipe) if key not in NOT_THE_RECIPE}, int(recipe.get("seed", 0))
    return EvaluatedRun(folder, seed, settings, content, tokens, statistics.median(speeds) if speeds else None)


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


def _measures(results: Sequence[ModelResult]) -> dict[str, Spread]:
    found = {}
    for title, read, factor, _ in MEASURES:
        values = [read(result) for result in results]
        if all(value is not None for value in values):
            found[title] = Spread(tuple(factor * value for value in values))
    return found


def _cells(row: Mapping[str, Spread]) -> Iterator[tuple[str, str]]:
    for title, _, _, digits in MEASURES:
        spread = row.get(title)
        if spread is None:
            yield number(None), ""
        else:
            yield number(spread.mean, digits), "" if spread.spread is None else f"\N{PLUS-MINUS SIGN} {number(spread.spread, digits)}"


def trade_off(rows: Mapping[str, Mapping[str, Spread]]) -> Figure:
    """Draw general loss against domain loss: each seed a point, each recipe its mean with one standard deviation."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        figure.set_label("General against domain loss")
        axes = figure.subplots()
        for index, (name, row) in enumerate(rows.items()):
            if "domain loss" not in row or "general loss" not in row:
                continue
            domain, general = row["domain loss"], row["general loss"]
            colour = GREY if name == "base" else COLOURS[(index - 1) % len(COLOURS)]
            marker = "*" if name == "base" else MARKERS[(index - 1) % len(MARKERS)]
            axes.scatter(domain.values, general.values, s=12, color=colour, alpha=0.5, linewidths=0)
            axes.errorbar(
                domain.mean,
                general.mean,
                yerr=general.spread,
                xerr=domain.spread,
                fmt=marker,
                color=colour,
                markersize=7,
                elinewidth=1.2,
                label=name,
            )
        axes.set_xlabel("domain loss (nats/token): further left has learnt more")
        axes.set_ylabel("general loss (nats/token): further down has kept more")
        axes.margins(0.15)
        figure.legend(loc="outside upper left", ncols=2)
        return figure


def _page(rows: Mapping[str, Mapping[str, Spread]], details: Mapping[str, Mapping[str, Any]]) -> str:
    shown = [index for index, (title, *_) in enumerate(MEASURES) if any(title in row for row in rows.values())]
    context = {
        "titles": [MEASURES[index][0] for index in shown],
        "rows": [(name, [list(_cells(row))[index] for index in shown], details.get(name)) for name, row in rows.items()],
        "picture": to_svg(trade_off(rows)),
        "tokens": sorted({detail["tokens"] for detail in details.values() if detail["tokens"]}),
    }
    return render("compare.html", context)
