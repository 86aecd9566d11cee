"""The run: which stages are due, in which order, and where each leaves its artefact.

    scores.json scores.png -> expanded/ -> tuned/ trainer_log.jsonl -> eval.json eval.items.safetensors -> report.html

An artefact records the inputs it was made from. One made from the same inputs is kept; one made from others is an error that names
what differs: nothing that was made is overwritten by another setting (eval.json and the report, made in minutes, are made again).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.data.items import is_tokenised, tokenize_item
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.models.silent_copies import describe
from adept_fast.pipeline.choose_layers import by_scores, check_layers
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.evaluate import base_against_tuned, evaluation_data, report
from adept_fast.pipeline.expand import expand, verify
from adept_fast.pipeline.planning.stage_costs import StageCosts
from adept_fast.pipeline.recipe import Recipe
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.score import score
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.pipeline.tune import TUNE, planned_text, tune, tuning_settings
from adept_fast.runtime.malloc import garbage_returned
from adept_fast.tuning.methods import METHODS

logger = logging.getLogger(__name__)


def run(recipe: Recipe, directory: RunDirectory) -> EvaluationResults:
    """Run all stages that are due, in order, and log what each took."""
    costs = StageCosts()
    source, data = opened(recipe)
    check(recipe, source, data, directory)
    evaluated = evaluation_data(recipe, source, data)
    text = None if directory.tuned.exists() else planned_text(recipe, source, data)
    costs.end("read")
    scores, expanded = None, None
    if by_scores(recipe):
        scores = score(recipe, source, data, directory)
        costs.end("score")
    if METHODS[recipe.method].copies:
        expanded = expand(recipe, source, data, directory, scores)
        costs.end("expand")
    tune(recipe, source, data, directory, expanded, text)
    garbage_returned()  # the Trainer's, before two models are evaluated
    costs.end("tune")
    directory.keep_recipe(recipe.as_dict())
    result = base_against_tuned(recipe, source, evaluated, directory)
    report(recipe, directory)
    costs.end("eval")
    logger.info(str(costs))
    return result


def opened(recipe: Recipe) -> tuple[SourceModel, Datasets]:
    source = SourceModel(recipe)
    return source, Datasets(recipe, source)


def check(recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory) -> None:
    """Find what is wrong with model, probe and settings before an hour of scoring."""
    directory.check_kept_recipe([entry.name for entry in fields(Recipe)])
    _check_tuning(recipe, source, data)
    check_layers(recipe, source)
    describe(source.skeleton)
    checkpoint.require_vocabulary(source.folder, source.tokenizer, source.skeleton)
    for record in (*data.probe.scoring, *data.probe.steering):
        if is_tokenised(record):
            tokenize_item(record, None, vocabulary=vocabulary_of(source.skeleton))


@TUNE
def _check_tuning(recipe: Recipe, source: SourceModel, data: Datasets) -> None:
    from adept_fast.tuning.baselines import check_rank
    from adept_fast.tuning.tuning_settings import check_meter, check_settings

    settings = tuning_settings(recipe)
    check_settings(settings)
    check_meter(settings, data.metering())
    if recipe.method == "lora":
        check_rank(source.skeleton, recipe.tune.lora_rank)


def _evaluate(recipe: Recipe, directory: RunDirectory) -> EvaluationResults:
    source, data = opened(recipe)
    return base_against_tuned(recipe, source, evaluation_data(recipe, source, data), directory)


STAGES: dict[str, Callable[[Recipe, RunDirectory], Any]] = {
    "score": lambda recipe, directory: score(recipe, *opened(recipe), directory),
    "expand": lambda recipe, directory: expand(recipe, *opened(recipe), directory),
    "verify": lambda recipe, directory: verify(recipe, SourceModel(recipe), directory),
    "tune": lambda recipe, directory: tune(recipe, *opened(recipe), directory),
    "eval": _evaluate,
    "run": run,
    "report": report,
}
"""By the command's name. One stage alone takes what those before it left in output_dir."""
