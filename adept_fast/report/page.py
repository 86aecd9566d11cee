"""Write report.html: did it learn, what was lost, what does it look like; then how, at what cost, and how to use the model."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast.report.artefacts import LOG, MAKERS, RECIPE, SCORES, UNITS, Artefacts
from adept_fast.report.certainty import conflicts, method_comparison, stability
from adept_fast.report.charts import layer_profile, losses, measure_of
from adept_fast.report.cost_table import costs
from adept_fast.report.differences import Differences, differences
from adept_fast.report.drawing import to_svg
from adept_fast.report.findings import learnt, looks, lost
from adept_fast.report.forgetting_chart import forgetting
from adept_fast.report.numbers import interval, number
from adept_fast.report.page_templates import flatten, render
from adept_fast.report.rates_chart import unit_rates
from adept_fast.report.result_table import columns, corpus_rows, shifted_row, sizes, task_rows
from adept_fast.report.side_by_side import pair
from adept_fast.report.units_chart import unit_profile
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.input_files import as_input_error
from adept_fast.scoring.scores import LayerScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CERTAINTY = (
    (stability, "How often each layer would be chosen, had the probe been other items of its kind. Orange: the chosen layers."),
    (conflicts, "Ranks by the general probe and by the domain, with 95 % bootstrap intervals. Shaded: layers that the two rank apart."),
    (method_comparison, "Whether other methods rank the layers alike."),
)
PLACED = {
    "lowest": "lowest (the layers on which general competence rests least, so that training disturbs least)",
    "lowest_per_band": "lowest_per_band (in each band of depth the layer on which general competence rests least)",
    "uniform": "uniform (evenly spaced)",
    "given": "given (by the recipe)",
}
PICTURES: dict[str, Callable[[LayerScores, Sequence[int]], Figure | None]] = {
    "scores.png": layer_profile,
    "scores.stability.png": lambda scores, _: stability(scores),
    "scores.conflicts.png": lambda scores, _: conflicts(scores),
    "scores.comparison.png": lambda scores, _: method_comparison(scores),
}
"""The charts of scores: file name -> function of (scores, the chosen layers), which returns a figure, or None without data."""


def write_report(output_dir: Path, recipe: Mapping[str, Any], versions: Mapping[str, str]) -> Path:
    """Write output_dir/report.html from the artefacts that exist, and return its path.

    A section whose artefact is missing is left out, and the page names the command that makes it. The page refers to nothing outside
    itself, and escapes all text. Raises InputError for a malformed artefact.
    """
    found = Artefacts.load(Path(output_dir), recipe)
    with as_input_error(found.folder / RECIPE, "restore it, or run adept-fast run again, which keeps it"):
        settings = list(flatten(recipe)) if recipe.get("model_name_or_path") else []
    context = {
        "model": found.model,
        **_paths(found.folder),
        "missing": [(name, *MAKERS[name]) for name in found.missing],
        "copies": found.method.copies,
        **_results(found),
        **_training(found),
        **_layers(found),
        "costs": list(costs(found)),
        "recipe": settings,
        "versions": versions,
    }
    target = found.folder / "report.html"
    write_text(target, render("page.html", context))
    return target


def _paths(folder: Path) -> dict[str, str]:
    """Return the paths of the code on the page, quoted for Python and for a shell."""
    tuned = str(folder / "tuned")
    return {
        "tuned": tuned,
        "python_tuned": repr(tuned),
        "shell_tuned": shlex.quote(tuned),
        "shell_recipe": shlex.quote(str(folder / RECIPE)),
    }


def _results(found: Artefacts) -> dict[str, Any]:
    results = found.evaluation
    answered = results.answers if results else ()
    changes = results.changes["tuned"].corpora() if results and "tuned" in results.changes else {}
    losses = {name: change.loss for name, change in changes.items()}
    others = {name: change for name, change in losses.items() if name != "domain"}
    beside = [name for name in results.base.corpora() if name != "domain"] if results else []

    def chart(rows: Mapping[str, Any]) -> Differences | None:
        return differences(rows.items(), losses.values()) if rows else None

    return {
        "learnt": learnt(results),
        "lost": lost(results),
        "looks": looks(answered),
        "models": columns(results) if results else [],
        "domain_chart": chart({name: change for name, change in losses.items() if name == "domain"}),
        "general_chart": chart(others),
        "domain_rows": list(corpus_rows(results, "domain")) if results else [],
        "general_rows": [*(row for name in beside for row in corpus_rows(results, name)), shifted_row(results)] if results else [],
        "task_rows": list(task_rows(results)) if results else [],
        "domain_size": sizes(results, ["domain"]) if results else "",
        "general_size": sizes(results, beside) if results else "",
        "same": {name: (result.same_as, result.reason) for name, result in results.models.items() if result.same_as} if results else {},
        "answers": [pair(answer) for answer in answered],
        "dial": results.dial if results else None,
    }


def _training(found: Artefacts) -> dict[str, Any]:
    history, path = found.history, found.folder / LOG
    return {
        "losses": _drawn(path, lambda: losses(history)) if history.training.steps or history.monitored else None,
        "forgetting": _drawn(path, lambda: forgetting(history.readings)) if history.readings else None,
        "rates": _drawn(path, lambda: unit_rates(history.refreshes)) if history.refreshes else None,
        "refreshes": len(history.refreshes),
    }


def _layers(found: Artefacts) -> dict[str, Any]:
    scores, units, path = found.scores, found.units, found.folder / SCORES
    drawn = [(text, _drawn(path, partial(draw, scores))) for draw, text in CERTAINTY] if scores else []
    return {
        "method": scores.method if scores else None,
        "measure": measure_of(scores) if scores else None,
        "notes": sentences(scores.notes) if scores else "",
        "profile": _drawn(path, lambda: layer_profile(scores, found.selection.layers)) if scores else None,
        "certainty": [(text, picture) for text, picture in drawn if picture],
        "units": _drawn(found.folder / UNITS, lambda: unit_profile(units)) if units else None,
        "record": found.record,
        "placement": PLACED.get(found.selection.placement or "", found.selection.placement or "not recorded"),
        "selection_notes": sentences(found.selection.notes),
        "inserted": _inserted(found),
    }


def _drawn(path: Path, draw: Callable[[], Figure | None]) -> str | None:
    """Draw a chart of what `path` holds; None without data. Raises InputError for numbers that cannot be drawn."""
    with as_input_error(path, "restore it, or delete it to make it again"):
        figure = draw()
        return None if figure is None else to_svg(figure)


def sentences(notes: Iterable[str]) -> str:
    """Join notes to sentences."""
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)


def _inserted(found: Artefacts) -> list[tuple[int, int, str, str]]:
    """List (copied from, index of the copy, primary score, its interval) of each copy that was trained."""
    if found.record is None:
        return []
    copies = [(entry.copied_from, entry.layer) for entry in found.record.inserted if entry.layer in found.record.trained]
    scored = found.selection.layers
    if found.scores is None or len(scored) != len(copies) or max(scored) >= len(found.scores.values):
        return [(old, new, number(None), "") for old, new in copies]
    profile = found.scores.profiles[found.scores.loss]
    return [
        (old, new, number(profile.values[at]), interval(profile.low[at], profile.high[at]))
        for (old, new), at in zip(copies, scored, strict=True)
    ]
