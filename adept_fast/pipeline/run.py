"""The run: which stages are due, in which order, and where each leaves its artefact.

    scores.json scores.png -> expanded/ -> tuned/ trainer_log.jsonl -> eval.json -> report.html

An artefact records the inputs it was made from. One made from the same inputs is kept; one made from others is an error that names
what differs: nothing that was made is overwritten by another setting (eval.json and the report, made in minutes, are made again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.data.items import is_tokenised, tokenize_item
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.models.silent_copies import describe
from adept_fast.pipeline.choose_layers import by_scores, check_layers
from adept_fast.pipeline.evaluate import base_against_tuned, evaluation_corpora, report
from adept_fast.pipeline.expand import expand, verify
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.pipeline.score import score
from adept_fast.pipeline.tune import TUNE, training_text, tune, tuning_settings


def run(work: Workspace) -> dict[str, Any]:
    """All stages that are due, in order."""
    _check(work)
    evaluated = evaluation_corpora(work)
    text = None if work.tuned.exists() else training_text(work)
    if by_scores(work):
        score(work)
    if work.method.copies:
        expand(work)
    tune(work, text)
    work.keep_recipe()
    result = base_against_tuned(work, *evaluated)
    report(work)
    return result


def _check(work: Workspace) -> None:
    """Find what is wrong with model, probe and settings before an hour of scoring."""
    work.check_kept_recipe()
    _check_tuning(work)
    check_layers(work)
    describe(work.skeleton)
    checkpoint.require_vocabulary(work.source, work.tokenizer, work.skeleton)
    for record in (*work.corpora.probe.scoring, *work.corpora.probe.steering):
        if is_tokenised(record):
            tokenize_item(record, None, vocabulary=vocabulary_of(work.skeleton))


@TUNE
def _check_tuning(work: Workspace) -> None:
    from adept_fast.tuning import check_meter, check_rank, check_settings

    settings = tuning_settings(work)
    check_settings(settings)
    check_meter(settings, work.corpora.metering())
    if work.recipe.method == "lora":
        check_rank(work.skeleton, work.recipe.tune.lora_rank)


STAGES: dict[str, Callable[[Workspace], Any]] = {
    "score": score,
    "expand": expand,
    "verify": verify,
    "tune": tune,
    "eval": lambda work: base_against_tuned(work, *evaluation_corpora(work)),
    "run": run,
    "report": report,
}
"""By the command's name. One stage alone takes what those before it left in output_dir."""
