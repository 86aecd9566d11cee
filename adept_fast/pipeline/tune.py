"""The third stage of a run: tuned/ and trainer_log.jsonl, by the recipe's method."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.data.items import Item
from adept_fast.data.preview import preview
from adept_fast.data.source_summary import table
from adept_fast.data.stream import Stream
from adept_fast.data.streamed_text import StreamedText
from adept_fast.errors import InputError
from adept_fast.evaluation.evaluation_corpus import corpus
from adept_fast.pipeline.datasets import Datasets, TrainingText
from adept_fast.pipeline.expand import expanded_record
from adept_fast.pipeline.model_card import card
from adept_fast.pipeline.recipe import Recipe, section
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.runtime import distributed
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import inputs_of, require_same
from adept_fast.settings.argument_effects import SCHEDULE, changes_the_run
from adept_fast.settings.training_arguments import known
from adept_fast.tuning.methods import METHODS
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from adept_fast.tuning.training_plan import PlannedText
    from adept_fast.tuning.tuning_settings import TuningSettings

logger = logging.getLogger(__name__)

ELSEWHERE = ("training", "replay", "streaming", "shuffle_window", "max_items", "extend", "skip_nonfinite")
"""Keys of tune that digests cover, that stand apart, or that change no bit until they let a run go on."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
TUNE = section("tune", training="tune", rank="tune.lora_rank", corpus="domain", sources="domain and tune.replay")
"""Calls a setting of tuning that is at fault by its key."""
OF_RATES = ("units", "rate_map", "rate_floor", "rate_average", "rate_conflict")


def tuning_settings(recipe: Recipe) -> TuningSettings:
    from adept_fast.tuning.tuning_settings import TuningSettings

    shared = {entry.name: getattr(recipe.tune, entry.name) for entry in fields(Tuning)}
    return TuningSettings(**shared, equal_rates=not METHODS[recipe.method].rates, seed=recipe.seed)


@TUNE
def planned_text(recipe: Recipe, source: SourceModel, data: Datasets) -> PlannedText:
    """Plan the blocks to train on, in memory or streamed.

    Logs what was read, two documents as the model will see them, and steps, tokens and epochs.
    """
    from adept_fast.tuning.training_plan import plan

    training = data.training()
    text = training if isinstance(training, StreamedText) else training.tokenize(source.encoder)
    planned = plan(text, source.encoder, tuning_settings(recipe), source.positions)
    summaries = data.summaries()
    unread = dict.fromkeys(line for _, summary in summaries[: len(data.trained_on)] for line in summary.keys_not_read())
    shows = ((logging.INFO, table(summaries)), (logging.WARNING, unread), (logging.INFO, samples(planned, source, data)))
    for level, lines in shows:
        for line in lines:
            logger.log(level, line)
    source.encoder.warn_of_control_tokens("domain")
    logger.info(str(planned.plan))
    for warning in filter(None, (planned.plan.warning, recipe.unused)):
        logger.warning(warning)
    return planned


def samples(text: PlannedText, source: SourceModel, data: Datasets) -> list[str]:
    """Return lines that show two documents as the model will see them."""
    training, blocks = data.training(), text.blocks
    first = blocks.head(2) if isinstance(blocks, Stream) else blocks
    return preview(first, training.shown if isinstance(training, TrainingText) else [0, 1], source.tokenizer)


def monitors(recipe: Recipe, source: SourceModel, data: Datasets) -> dict[str, Sequence[Item]]:
    """Return the items whose losses training logs, by name."""
    limit, most = min(source.positions, recipe.tune.block_size), recipe.tune.max_items
    records = data.held_out(most)
    held = corpus("held-out domain documents", records, source.encoder, limit, source.vocabulary(records))
    return {"general": data.items(data.reporting(most)), "domain": held.items}


@TUNE
def tune(
    recipe: Recipe,
    source: SourceModel,
    data: Datasets,
    directory: RunDirectory,
    record: AdeptConfig | None = None,
    text: PlannedText | None = None,
) -> None:
    """Write tuned/ from expanded/, or from the base by a method without copies.

    record: of expanded/; text: to train on. Both are read if they are not given.
    """
    from adept_fast.tuning.baselines import tune_baseline
    from adept_fast.tuning.training_run import RunFiles
    from adept_fast.tuning.tune_checkpoint import tune_checkpoint
    from adept_fast.tuning.tuning_settings import check_settings

    distributed.join()
    keys, tuned = recipe.tune, directory.tuned
    if METHODS[recipe.method].copies:
        record = record or expanded_record(source, directory)
    inputs, explained = _inputs(recipe, source, data, record), _explained(data)
    if not due(recipe, source, data, directory, record):
        return
    check_settings(tuning_settings(recipe))
    text = text or planned_text(recipe, source, data)
    batch = distributed.world_size() * math.prod(int(keys.training.get(key, 1)) for key in BATCH)  # of a step, however it is shared out
    given = {**_of_recipe(inputs), "global batch": batch}
    if isinstance(text.corpus, StreamedText):
        given["domain"] = text.corpus.settings_digest  # each checkpoint keeps what was read; what was not may be repaired
    files = RunFiles(directory.checkpoints, directory.log, inputs, given, partial(card, recipe, source, directory))
    if files.last is not None:
        if not files.inputs_file.exists():
            raise InputError(f"{files.checkpoints}: its checkpoints are not of a run in this output_dir: move them away or choose another")
        require_same(files.checkpoints, _of_recipe(read_json(files.inputs_file)), given, source.name, explained)
    monitored = monitors(recipe, source, data)
    with files.removed_if_refused():
        if record is not None:
            metering = data.items(records) if (records := data.metering()) else ()
            steering = data.items(data.steering())
            tune_checkpoint(directory.expanded, tuned, text, steering, monitored, files, metering=metering, models=source.models)
            logger.info(f"{tuned}: tuned; every original tensor is bit-equal to {directory.expanded.name}/")
        else:
            method = recipe.method
            tune_baseline(source.folder, tuned, method, text, monitored, files, rank=keys.lora_rank, models=source.models)
            logger.info(f"{tuned}: tuned by {method}, without copies")


def due(recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory, record: AdeptConfig | None) -> bool:
    """Return whether tuned/ is to be made, or made anew because the number of steps changed.

    Raises InputError that names what differs if it was made with other settings.
    """
    tuned, checkpoints = directory.tuned, directory.checkpoints
    if not tuned.exists():
        return True
    inputs, recorded = _inputs(recipe, source, data, record), inputs_of(tuned_record(tuned))
    require_same(tuned, _compared(recorded), _compared(inputs), source.name, _explained(data))
    schedule = [f"tune.{name}" for name in sorted(SCHEDULE) if recorded.get(f"tune.{name}") != inputs.get(f"tune.{name}")]
    if not schedule:
        logger.info(f"{tuned}: up to date")
        return False
    if not any(checkpoints.glob("checkpoint-*")):
        raise InputError(
            f"{tuned} was made with other settings ({', '.join(schedule)}), and {checkpoints} holds no checkpoint to go on from: "
            "choose another output_dir, or remove it to redo it"
        )
    anew = "it stands until training has gone on; then it, eval.json and the report are made anew"
    logger.info(f"{tuned}: {', '.join(schedule)} changed: {anew}")
    return True


def _explained(data: Datasets) -> dict[str, str]:
    """Explain what it means that these inputs differ."""
    if data.streamed:
        return {"domain": "what a source holds, how it is read, or what is held out or measured on"}
    return {"domain": "a row that was repaired, added or taken away makes another corpus, trained on in another order"}


def _compared(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must be the same for an artefact to be reused.

    Leaves out settings without effect on the result and those at their default. Counts the batch of all processes, and compares settings
    of the learning rate schedule with the checkpoint.
    """
    names = {key: key.removeprefix("tune.") for key in inputs if key.startswith("tune.") and key.removeprefix("tune.") in known()}
    left = {key: value for key, value in inputs.items() if key not in names and key not in ("tune.extend", "extended")}
    changing = {key: inputs[key] for key, name in names.items() if changes_the_run(name) and inputs[key] != known()[name][1]}
    batch = math.prod(int(inputs.get(f"tune.{key}", 1)) for key in BATCH)
    return {**left, **changing, "tune.per_device_train_batch_size": batch}


def _of_recipe(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that are no TrainingArguments; each checkpoint stores those itself."""
    return {key: value for key, value in inputs.items() if key.removeprefix("tune.") not in known()}


def tuned_record(folder: Path) -> AdeptConfig | dict[str, Any]:
    """Return the record of how a checkpoint was tuned, by any method."""
    baseline = folder / "baseline.json"
    return read_json(baseline) if baseline.is_file() else AdeptConfig.load(folder)


def _inputs(recipe: Recipe, source: SourceModel, data: Datasets, record: AdeptConfig | None) -> dict[str, Any]:
    tune, method = recipe.tune, METHODS[recipe.method]
    idle = {
        *(OF_RATES if not method.rates else ()),
        *(("refresh_steps",) if not method.copies else ()),
        *(("lora_rank",) if recipe.method != "lora" else ()),
        *(("anchor_every", "anchor_tokens") if tune.anchor_weight is None else ()),
        *(("general_action",) if tune.general_limit is None else ()),
    }
    inputs = {
        **source.inputs,
        "method": recipe.method,
        **({} if record is None else recipe.copied([entry.copied_from for entry in record.inserted])),
        "domain": data.training().digest,
        "steering items": data.digest(data.steering()),
        **({} if tune.general_limit is None else {"metering items": data.digest(data.metering())}),
        "seed": recipe.seed,
        **{f"tune.{key}": value for key, value in vars(tune).items() if key not in ELSEWHERE and key not in idle},
        **{f"tune.{key}": value for key, value in tune.training.items()},
    }
    return json.loads(json.dumps(inputs, default=str))
