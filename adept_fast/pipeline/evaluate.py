"""The last stages of a run: eval.json, base against tuned and how far the dial can stay open, and report.html."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.adept_config import AdeptConfig, versions
from adept_fast.errors import InputError
from adept_fast.evaluation import EvaluationCorpus, corpus, evaluate, largest_alpha
from adept_fast.expansion import PRESERVING
from adept_fast.pipeline.recipe import section
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.pipeline.tune import tuned_record
from adept_fast.report import write_report
from adept_fast.report.results import read_results
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.input_files import read_yaml
from adept_fast.runtime.provenance import changed, digest, inputs_of


def evaluation_corpora(work: Workspace) -> tuple[EvaluationCorpus, EvaluationCorpus | None, dict[str, str]]:
    """The general corpus, the domain's where there is one, and digests of their records."""
    limit = work.recipe.eval.max_items
    records = {"general": work.corpora.evaluation_general(limit)}
    if work.recipe.domain or work.recipe.eval.domain:
        records["domain"] = work.corpora.held_out(limit)
    found = {name: corpus(name, each, work.encoder, work.positions, work.vocabulary(each)) for name, each in records.items()}
    work.encoder.warn_of_control_tokens("what is evaluated on")
    return found["general"], found.get("domain"), {name: work.corpora.digest(each) for name, each in records.items()}


@section("eval", limit="eval.general_limit")
def base_against_tuned(
    work: Workspace, general: EvaluationCorpus, domain: EvaluationCorpus | None, digests: Mapping[str, str]
) -> dict[str, Any]:
    """eval.json: base, expanded and tuned, as far as they exist. The expanded one is the base by proof, and not evaluated again."""
    limit, expanded, tuned = work.recipe.eval.general_limit, work.kept(work.expanded, AdeptConfig.load), work.kept(work.tuned, tuned_record)
    inputs = {**work.base_inputs(), **digests, "eval.general_limit": limit, "expanded": expanded is not None}
    if tuned is not None:
        inputs["tuned"] = digest(inputs_of(tuned))
    result = work.kept(work.eval_path, read_results)
    if result is not None and not changed(inputs_of(result), inputs):
        work.say(f"{work.eval_path}: up to date")
    else:
        started = time.perf_counter()
        base, argmax = evaluate(work.load(work.source), general, domain, (), "base")
        models, found = {"base": base}, {}
        if expanded is not None and PRESERVING[expanded.initialisation]:
            models["expanded"] = {"same_as": "base", "reason": "logits bit-equal, verified when it was written"}
        elif expanded is not None:
            models["expanded"], _ = evaluate(work.load(work.expanded), general, domain, argmax, "expanded")
        if tuned is not None:
            model = work.load(work.tuned)
            models["tuned"], _ = evaluate(model, general, domain, argmax, "tuned")
            if limit is not None and work.method.copies:
                found = {"dial": largest_alpha(model, general, domain, limit)}
        seconds = time.perf_counter() - started
        result = {"schema": 1, "models": models, **found, "seconds": seconds, "inputs": inputs, "versions": versions()}
        write_json(work.eval_path, result)
    _tell(work, result)
    return result


def _tell(work: Workspace, result: Mapping[str, Any]) -> None:
    models = result["models"]
    for name in ("domain", "general"):
        losses = [f"{model} {models[model][name]['loss']:.3f}" for model in ("base", "tuned") if name in models.get(model, {})]
        if losses:
            work.say(f"{name} loss: {' -> '.join(losses)} nats per token")
    if dial := result.get("dial"):
        there = f", domain loss {dial['domain_loss']:.3f}" if "domain_loss" in dial else ""
        work.say(
            f"alpha {dial['alpha']:g} is the largest share of the copies with general loss within {dial['limit']:g} nats of the base's "
            f"(it rises by {dial['rise']:.3f} [{dial['low']:.3f}, {dial['high']:.3f}]){there}: "
            f"adept-fast copies dial source={work.tuned} target=... alpha={dial['alpha']:g} writes it"
        )


def report(work: Workspace) -> Path:
    """report.html, with the recipe that `run` kept."""
    if not any(path.exists() for path in (work.scores_path, work.expanded, work.eval_path)):
        raise InputError(f"{work.folder}: holds no artefacts to report: run adept-fast run first")
    kept = work.folder / "recipe.yaml"
    recipe = read_yaml(kept) if kept.exists() else work.recipe.as_dict()
    path = write_report(work.folder, recipe, versions())
    work.say(f"report: {path}")
    return path
