"""The last stages of a run: eval.json compares base, expanded and tuned model, and report.html shows the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import AdeptConfig, versions
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.errors import InputError
from adept_fast.evaluation.answers import Prompt, answers, drawn_prompts, given_prompts
from adept_fast.evaluation.evaluate_model import Evaluated, evaluate
from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus, corpus
from adept_fast.evaluation.largest_alpha import largest_alpha
from adept_fast.evaluation.lm_tasks import LmTasks, load_tasks
from adept_fast.evaluation.paired_items import items_path, save_items
from adept_fast.evaluation.results import Answer, EvaluationResults
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.model_card import renew
from adept_fast.pipeline.recipe import Recipe, section
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.pipeline.tune import tuned_record
from adept_fast.report.page import write_report
from adept_fast.runtime.input_files import read_json, read_yaml
from adept_fast.runtime.provenance import changed, digest
from adept_fast.tuning.methods import METHODS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationData:
    """What models are evaluated on.

    also: further corpora by name. prompts: to answer. digests: of all these, by name. tasks: of lm-eval
    """

    general: EvaluationCorpus
    domain: EvaluationCorpus | None
    also: Mapping[str, EvaluationCorpus]
    prompts: Sequence[Prompt]
    digests: Mapping[str, str]
    tasks: LmTasks | None = None


@section("eval")
def evaluation_data(recipe: Recipe, source: SourceModel, data: Datasets) -> EvaluationData:
    """Read and tokenise the corpora, and draw the prompts."""
    keys, encoder = recipe.eval, source.encoder
    records = {"general": data.evaluation_general(keys.max_items)}
    if recipe.domain or keys.domain:
        records["domain"] = data.held_out(keys.max_items)
    records |= (further := data.further(keys.max_items))
    corpora = {name: corpus(name, each, encoder, source.positions, source.vocabulary(each)) for name, each in records.items()}
    room, general, domain = source.positions - keys.answer_tokens, corpora["general"], corpora.get("domain")
    if keys.prompts is None:
        prompts = drawn_prompts(general, records["general"], domain, encoder, keys.answer_tokens, room)
    else:
        prompts = given_prompts(keys.prompts, encoder, None, room, "eval.prompts")
    encoder.warn_of_control_tokens("what is evaluated on")
    if source.earlier is not None and not further:
        logger.info("the model holds copies of an earlier domain: eval.also.NAME={path: ..., held_out: true} measures that one's loss too")
    tasks = load_tasks(keys.tasks, keys.tasks_limit, keys.tasks_include_path) if keys.tasks else None
    digests = {f"also.{name}" if name in further else name: data.digest(each) for name, each in records.items()}
    return EvaluationData(
        general,
        domain,
        {name: corpora[name] for name in further},
        prompts,
        {
            **digests,
            "answers": digest([keys.answer_tokens, [vars(prompt) for prompt in prompts]]),
            **({} if tasks is None else {"tasks": tasks.digest}),
        },
        tasks,
    )


@section("eval", limit="eval.general_limit")
def base_against_tuned(recipe: Recipe, source: SourceModel, data: EvaluationData, directory: RunDirectory) -> EvaluationResults:
    """Write eval.json for base, expanded and tuned model, as far as they exist, and return its content.

    An expanded model that equals the base by proof is not evaluated. eval.json is made again if the models on disk have changed, or if an
    earlier version wrote it.
    """
    limit, path, of_model = recipe.eval.general_limit, directory.evaluation, {"model": source.identity}
    expanded = directory.kept(directory.expanded, AdeptConfig.load, of_model, source.name, whole=False)
    tuned = directory.kept(directory.tuned, tuned_record, of_model, source.name, whole=False)
    differs = expanded is not None and not PRESERVING[expanded.initialisation]
    evaluated = {**({"expanded": directory.expanded} if differs else {}), **({} if tuned is None else {"tuned": directory.tuned})}
    inputs = {**source.inputs, **data.digests, "eval.general_limit": limit, "expanded": expanded is not None}
    inputs |= {f"{name} model": fingerprint(folder) for name, folder in evaluated.items()}
    result = directory.kept(path, _read, of_model, source.name, whole=False)
    if isinstance(result, EvaluationResults) and items_path(path).is_file() and not changed(result.inputs, inputs):
        logger.info(f"{path}: up to date")
    else:
        started, load = time.perf_counter(), source.models.load
        measure = partial(_measure, recipe=recipe, source=source, data=data)
        base = measure(source.load(), str(source.name))
        found = {name: measure(load(folder), str(folder), base.argmax) for name, folder in evaluated.items()}
        models = {"base": base.result}
        if expanded is not None and not differs:
            proof = "logits bit-equal, verified when it was written"
            models["expanded"] = replace(base.result, shifted_tokens=0.0, same_as="base", reason=proof)
        dial = None
        if tuned is not None and limit is not None and METHODS[recipe.method].copies:
            dial = largest_alpha(load(directory.tuned), data.general, data.domain, limit)
        result = EvaluationResults(
            models={**models, **{name: each.result for name, each in found.items()}},
            changes={name: each.change(base) for name, each in found.items()},
            seconds=time.perf_counter() - started,
            inputs=inputs,
            versions=versions(),
            answers=_paired(data.prompts, base, found.get("tuned")),
            tasks={} if data.tasks is None else data.tasks.compared(base.tasks, found["tuned"].tasks if "tuned" in found else None),
            dial=dial,
        )
        save_items(path, {name: each.items for name, each in {"base": base, **found}.items()})
        result.save(path)
    if tuned is not None:
        renew(source, directory, tuned, result)
    _tell(result, directory.tuned)
    return result


def _measure(
    model: PreTrainedModel, title: str, base_argmax: Sequence[Tensor] = (), *, recipe: Recipe, source: SourceModel, data: EvaluationData
) -> Evaluated:
    found = evaluate(model, data.general, data.domain, base_argmax, title, data.also)
    said = answers(model, data.prompts, source.encoder, recipe.eval.answer_tokens, title)
    return replace(found, answers=said, tasks={} if data.tasks is None else data.tasks.run(model, source.tokenizer))


def _paired(prompts: Sequence[Prompt], base: Evaluated, tuned: Evaluated | None) -> tuple[Answer, ...]:
    after = [None] * len(prompts) if tuned is None else tuned.answers
    return tuple(prompt.answered(*pair) for prompt, *pair in zip(prompts, base.answers, after, strict=True))


def _read(path: Path) -> EvaluationResults | dict[str, Any]:
    """Read eval.json, or only its table if it is of the earlier schema."""
    content = read_json(path)
    return content if content.get("schema") == 1 else EvaluationResults.of(content, path)


def _tell(result: EvaluationResults, tuned: Path) -> None:
    for name in ("domain", "general", *result.base.also):
        measured = {model: corpora[name] for model in ("base", "tuned") if name in (corpora := result.corpora(model))}
        if measured:
            losses = " -> ".join(f"{model} {each.loss:.3f}" for model, each in measured.items())
            logger.info(f"{name} loss: {losses} nats per token")
    if (dial := result.dial) is not None:
        there = "" if dial.domain_loss is None else f", domain loss {dial.domain_loss:.3f}"
        logger.info(
            f"alpha {dial.alpha:g} is the largest share of the copies with general loss within {dial.limit:g} nats of the base's "
            f"(it rises by {dial.rise:.3f} [{dial.low:.3f}, {dial.high:.3f}]){there}: "
            f"adept-fast copies dial source={tuned} target=... alpha={dial.alpha:g} writes it"
        )


def report(recipe: Recipe, directory: RunDirectory) -> Path:
    """Write report.html with the recipe that `run` stored, and return its path."""
    if not any(path.exists() for path in (directory.scores, directory.expanded, directory.evaluation)):
        raise InputError(f"{directory.folder}: holds no artefacts to report: run adept-fast run first")
    kept = directory.recipe
    path = write_report(directory.folder, read_yaml(kept) if kept.exists() else recipe.as_dict(), versions())
    logger.info(f"report: {path}")
    return path
