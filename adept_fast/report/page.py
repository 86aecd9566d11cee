"""Write report.html: one self-contained page from the artefacts that an output_dir holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import InputError
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.report.certainty import conflicts, method_comparison, stability
from adept_fast.report.charts import layer_profile, losses, measure_of
from adept_fast.report.drawing import to_svg
from adept_fast.report.forgetting_chart import forgetting
from adept_fast.report.rates_chart import unit_rates
from adept_fast.report.results import interval, is_finite, next_copy, number, table, verdict
from adept_fast.report.units_chart import unit_profile
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.input_files import as_input_error, read_json
from adept_fast.settings.validation import shown
from adept_fast.tuning.methods import METHODS
from adept_fast.tuning.trainer_log import read_log

T = TypeVar("T")
RECORD = "expanded/adept_config.json"
MAKERS = {
    "eval.json": ("the results", "eval"),
    "scores.json": ("the layer profile", "score"),
    RECORD: ("what was inserted", "expand"),
    "trainer_log.jsonl": ("rates and losses over training", "tune"),
}
CERTAINTY = (
    (stability, "How often each layer would be chosen, had the probe been other items of its kind. Orange: the chosen layers."),
    (conflicts, "Ranks by the general probe and by the domain, with 95 % bootstrap intervals. Shaded: layers that the two rank apart."),
    (method_comparison, "Whether other methods rank the layers alike."),
)

PICTURES = {
    "scores.png": layer_profile,
    "scores.stability.png": lambda scores, _: stability(scores),
    "scores.conflicts.png": lambda scores, _: conflicts(scores),
    "scores.comparison.png": lambda scores, _: method_comparison(scores),
}
"""The charts of scores.json: file name -> function of (its content, the chosen layers), which returns a figure, or None without data."""


def write_report(output_dir: Path, recipe: Mapping[str, Any], versions: Mapping[str, str]) -> Path:
    """Write output_dir/report.html from the artefacts that exist, and return its path.

    A section whose artefact is missing is left out, and the page names the command that makes it. The page refers to nothing outside
    itself, and escapes all text. Raises InputError for a malformed artefact.
    """
    output_dir = Path(output_dir)
    files = {name: output_dir / name for name in MAKERS}
    results = EvaluationResults.load(files["eval.json"]) if files["eval.json"].is_file() else None
    scores, units = (_read(output_dir / name) for name in ("scores.json", "unit_scores.json"))
    record = AdeptConfig.load(files[RECORD].parent) if files[RECORD].is_file() else None
    log = read_log(files["trainer_log.jsonl"])
    models = {} if results is None else results.models
    refreshes = [entry for entry in log if entry.get("event") == "refresh" and entry.get("rates")]
    measured = [entry for entry in log if entry.get("event") in ("step", "evaluation")]
    readings = [entry for entry in log if entry.get("event") == "forgetting"]
    chosen = [entry.copied_from for entry in record.inserted] if record else []
    names = recipe.get("model_name_or_path"), record and record.source.get("name_or_path"), (scores or {}).get("model")
    model = str(next(filter(None, names), "model"))

    def checked(name: str, make: Callable[[], T]) -> T:
        with as_input_error(output_dir / name, "restore it, or delete it to make it again"):
            return make()

    method = checked("recipe.yaml", lambda: METHODS.get(recipe.get("method", "adept"), METHODS["adept"]))
    unused = {*(["scores.json"] if method.uniform or not method.copies else []), *([] if method.copies else [RECORD])}
    context = {
        "model": model.rstrip("/").rpartition("/")[2] or model,
        "verdict": verdict(results),
        "missing": [(name, what, command) for name, (what, command) in MAKERS.items() if name not in unused and not files[name].is_file()],
        "models": list(models),
        "results": table(results),
        "same": {name: result for name, result in models.items() if result.same_as},
        "corpora": [] if results is None else _corpora(results),
        "scores": scores,
        "profile": checked("scores.json", lambda: to_svg(layer_profile(scores, chosen))) if scores else None,
        "certainty": checked(
            "scores.json", lambda: [(text, to_svg(figure)) for draw, text in CERTAINTY if (figure := draw(scores or {})) is not None]
        ),
        "units": checked("unit_scores.json", lambda: to_svg(unit_profile(units))) if units else None,
        "notes": checked("scores.json", lambda: sentences((scores or {}).get("notes"))),
        "copies": checked(RECORD, lambda: _copies(record)) if record else None,
        "rates": checked("trainer_log.jsonl", lambda: to_svg(unit_rates(refreshes))) if refreshes else None,
        "refreshes": len(refreshes),
        "forgetting": checked("trainer_log.jsonl", lambda: to_svg(forgetting(readings))) if readings else None,
        "losses": checked("trainer_log.jsonl", lambda: to_svg(losses(measured))) if measured else None,
        "record": record,
        "inserted": checked("scores.json", lambda: _inserted(record, scores)),
        "measure": checked("scores.json", lambda: measure_of(scores)) if scores else None,
        "costs": [
            *checked("scores.json", lambda: _scoring_costs(scores or {})),
            *checked("trainer_log.jsonl", lambda: list(_tuning_costs(log))),
            *([] if results is None else [("Evaluation", duration(results.seconds))]),
        ],
        "recipe": checked("recipe.yaml", lambda: list(flatten(recipe))) if recipe.get("model_name_or_path") else [],
        "versions": versions,
    }
    target = output_dir / "report.html"
    write_text(target, render("page.html", context))
    return target


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill in a template of this folder, escaping all text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files(__package__).joinpath(template).read_text(encoding="utf-8")).render(context)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("schema") != 1:
        raise InputError(f"{path}: schema {shown(content.get('schema'))} is not the known 1: use the version of adept_fast that wrote it")
    return content


def _corpora(results: EvaluationResults) -> list[str]:
    """List the corpora of the results: "general: 96 items, 2,881 tokens"."""
    return [f"{corpus}: {each.items:,} items, {each.tokens:,} tokens" for corpus, each in results.base.corpora().items()]


def sentences(notes: Sequence[str] | None) -> str:
    """Join notes to sentences."""
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes or ())


def _copies(record: AdeptConfig) -> str:
    """Write how many parameters train, what the copies cost, and the notes on their selection."""
    total, trainable = (record.parameters.get(key) for key in ("total", "trainable"))
    shares = f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.1f} %)." if total and trainable else ""
    return " ".join(filter(None, (shares, next_copy(record.selection), sentences(record.selection.get("notes")))))


def _inserted(record: AdeptConfig | None, scores: Mapping[str, Any] | None) -> list[tuple[int, int, str, str]]:
    """List (copied from, new index, primary score, its interval) of each copy."""
    profile = ((scores or {}).get("profiles") or {}).get((scores or {}).get("loss")) or {}

    def at(key: str, layer: int) -> Any:
        values = profile.get(key) or []
        return values[layer] if layer < len(values) else None

    copies = [(entry.copied_from, entry.layer) for entry in (record.inserted if record else ())]
    return [(old, new, number(at("values", old)), interval(at("low", old), at("high", old))) for old, new in copies]


def _scoring_costs(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not is_finite(scores.get("seconds")):
        return []
    size = f"{scores.get('items', 0):,} items, {scores.get('tokens', 0):,} supervised tokens"
    return [("Scoring", f"{duration(scores['seconds'])} for {size}")]


def _tuning_costs(log: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    plan: Mapping[str, Any] = next((entry for entry in reversed(log) if entry.get("event") == "plan"), {})
    speeds = [entry["tokens_per_second"] for entry in log if is_finite(entry.get("tokens_per_second"))]
    end = next((entry for entry in log if entry.get("event") == "end"), {})
    done = max((entry["step"] for entry in log), default=0)
    if plan:
        epochs = f", {plan['epochs']:.2f} epochs" if is_finite(plan.get("epochs")) else ""
        yield "Tuning, planned", f"{plan.get('steps', 0):,} steps, {plan.get('tokens', 0):,} tokens{epochs}"
        yield "Tuning, done", f"{done:,} steps" + ("" if end else " (not finished)")
    if speeds:
        yield "Training speed", f"{statistics.median(speeds):,.0f} tokens/s (median)"
    peaks = [entry["peak_memory"] for entry in log if is_finite(entry.get("peak_memory"))]
    if peaks:
        yield "Peak memory of tuning", f"{max(peaks) / 2**30:.2f} GiB"
    if is_finite(end.get("seconds")):
        yield "Tuning time", duration(end["seconds"])
    elif speeds and plan.get("tokens") and plan.get("steps"):
        tokens = plan["tokens"] * done / plan["steps"]
        yield "Tuning time", f"about {duration(tokens / statistics.median(speeds))} (tokens / median tokens/s)"


def duration(seconds: float) -> str:
    """85.3 -> "1 min 25 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """List settings as (dotted key, value), without those that are null."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, (list, tuple)) and any(isinstance(entry, Mapping) for entry in content):
        for index, entry in enumerate(content):
            yield from flatten(entry, f"{prefix}[{index}]")
    elif content is not None:
        yield prefix, ", ".join(map(str, content)) if isinstance(content, (list, tuple)) else str(content)
