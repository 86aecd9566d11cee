"""The model card of tuned/: what the recipe trained on, and the scores once eval.json exists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.model_card import FILE, Training, model_card, with_scores, write_card
from adept_fast.data.source_files import source_files
from adept_fast.data.sources import GENERAL, Source
from adept_fast.evaluation.results import Change, EvaluationResults
from adept_fast.pipeline.recipe import Recipe
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.tuning.trainer_log import read_log

logger = logging.getLogger(__name__)


def card(
    recipe: Recipe,
    source: SourceModel,
    directory: RunDirectory,
    record: AdeptConfig | Mapping[str, Any],
) -> str:
    """Return the text of the card of a tuned/ that was just trained. record: of the copies, or the content of baseline.json."""
    return model_card(_base(source, record), source.folder, record, _training(recipe, directory))


def renew(source: SourceModel, directory: RunDirectory, record: AdeptConfig | Mapping[str, Any], results: EvaluationResults) -> None:
    """Put the scores into the card of tuned/, unless it was edited. A card that is missing is made from the record."""
    path = directory.tuned / FILE
    made = path.is_file()
    text = path.read_text(encoding="utf-8", errors="replace") if made else model_card(_base(source, record), source.folder, record)
    if not write_card(directory.tuned, with_scores(text, scores(results))):
        logger.info(f"{directory.tuned / FILE}: edited, so it stays as it is; the scores are in {directory.evaluation.name}")


def scores(results: EvaluationResults) -> list[str]:
    """Return Markdown lines of the losses and accuracies of base and tuned model, with their paired changes."""
    if results.tuned is None:
        return []
    changes, tuned = results.changes["tuned"].corpora(), results.tuned.corpora()
    rows = ["| | items | before | this model | change [95 % interval] |", "|---|---|---|---|---|"]
    for name, base in results.base.corpora().items():
        here, change = tuned[name], changes[name]
        rows.append(f"| {name} loss, nats per token | {base.items:,} | {base.loss:.3f} | {here.loss:.3f} | {_change(change.loss)} |")
        if base.accuracy is not None and change.accuracy is not None:
            rows.append(f"| {name} accuracy | {base.items:,} | {base.accuracy:.3f} | {here.accuracy:.3f} | {_change(change.accuracy)} |")
    for task, found in results.tasks.items():
        for metric, value in found.metrics.items():
            if value.tuned is not None and value.change is not None:
                rows.append(f"| {task} {metric} | {found.items:,} | {value.base:.3f} | {value.tuned:.3f} | {_change(value.change)} |")
    if results.tuned.shifted_tokens is not None:
        share = f"{results.tuned.shifted_tokens:.1%} of the positions of the general text have another likeliest token than the base's."
        rows += ["", "Both models saw the same items; intervals are of a bootstrap over them. " + share]
    return rows


def _change(change: Change) -> str:
    return f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _base(source: SourceModel, record: AdeptConfig | Mapping[str, Any]) -> str:
    return str(record.source.get("name_or_path", source.name) if isinstance(record, AdeptConfig) else source.name)


def _training(recipe: Recipe, directory: RunDirectory) -> Training:
    """Return what was trained on, by the recipe and the log."""
    steps = tokens = None
    for entry in read_log(directory.log):
        if entry["event"] == "plan" and entry.get("steps") and entry.get("tokens") is not None:
            steps, tokens = int(entry["steps"]), int(entry["tokens"])
        elif entry["event"] == "end" and steps and tokens is not None and entry["step"]:
            steps, tokens = entry["step"], tokens // steps * entry["step"]
    replay = recipe.tune.replay
    data = [_name(each) for each in recipe.domain] + ([] if replay is None else [f"{_name(replay)} for replay"])
    sources = [*recipe.domain, *([] if replay is None else [replay])]
    return Training(data, [each.path for each in sources if _on_a_hub(each)], steps, tokens)


def _name(source: Source) -> str:
    """Return a dataset's name, or a file's without its folder."""
    if source.path == GENERAL:
        return "the general probe of adept_fast"
    return f"`{source.path if _on_a_hub(source) else Path(source.path).name}`"


def _on_a_hub(source: Source) -> bool:
    return source.path != GENERAL and not source.file.exists() and source_files(source) is None
