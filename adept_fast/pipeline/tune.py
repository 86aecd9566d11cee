"""The third stage of a run: tuned/ and trainer_log.jsonl, by the recipe's method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.data.documents import WeightedDocuments
from adept_fast.data.packing import Blocks
from adept_fast.data.preview import preview
from adept_fast.data.source_summary import table
from adept_fast.data.streamed_text import StreamedText
from adept_fast.errors import InputError
from adept_fast.evaluation import corpus
from adept_fast.pipeline.recipe import section
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.runtime import distributed
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import inputs_of, require_same
from adept_fast.settings.argument_effects import SCHEDULE, changes_the_run
from adept_fast.settings.training_arguments import known
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from adept_fast.tuning import TuningSettings

ELSEWHERE = ("training", "replay", "streaming", "shuffle_window", "max_items", "extend", "skip_nonfinite")
"""Keys of tune that digests cover, that stand apart, or that change no bit until they let a run go on."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
TUNE = section("tune", training="tune", rank="tune.lora_rank", corpus="domain", sources="domain and tune.replay")
"""Calls a setting of tuning that is at fault by its key."""
OF_RATES = ("units", "rate_map", "rate_floor", "rate_average", "rate_conflict")


def tuning_settings(work: Workspace) -> TuningSettings:
    from adept_fast.tuning import TuningSettings

    tune = work.recipe.tune
    shared = {entry.name: getattr(tune, entry.name) for entry in fields(Tuning)}
    return TuningSettings(**shared, equal_rates=not work.method.rates, seed=work.recipe.seed)


@TUNE
def training_text(work: Workspace) -> WeightedDocuments | StreamedText:
    """What to train on, as tokens or to be streamed. Says what was read, shows two documents as the model will see them, and says what
    tuning is going to do."""
    from adept_fast.tuning import plan

    training = work.corpora.training()
    text = training if isinstance(training, StreamedText) else training.tokenize(work.encoder)
    planned, blocks = plan(text, work.encoder, tuning_settings(work), work.positions)
    summaries = work.corpora.summaries()
    unread = dict.fromkeys(line for _, summary in summaries[: len(work.corpora.trained_on)] for line in summary.keys_not_read())
    first, shown = (blocks, training.shown) if isinstance(blocks, Blocks) else (blocks.head(2), [0, 1])
    for line in [*table(summaries), *unread, *preview(first, shown, work.tokenizer)]:
        work.say(line)
    work.encoder.warn_of_control_tokens("domain")
    for line in (str(planned), planned.warning, work.recipe.unused):
        work.tell(line)
    return text


@TUNE
def tune(work: Workspace, text: WeightedDocuments | StreamedText | None = None) -> None:
    """tuned/ of expanded/, or of the base by a method without copies. text: what to train on, where it is at hand already."""
    from adept_fast.tuning import Bookkeeping, check_settings, tune_baseline, tune_checkpoint

    distributed.join()
    keys, record = work.recipe.tune, work.copies() if work.method.copies else None
    inputs = _inputs(work, record)
    if not _due(work, inputs):
        return
    settings = tuning_settings(work)
    check_settings(settings)
    text = training_text(work) if text is None else text
    batch = distributed.processes() * math.prod(int(keys.training.get(key, 1)) for key in BATCH)  # of a step, however it is shared out
    given = {**_of_recipe(inputs), "global batch": batch}
    if isinstance(text, StreamedText):
        given["domain"] = text.settings_digest  # each checkpoint keeps what was read; what was not may be repaired
    books = Bookkeeping(work.checkpoints, work.log, inputs, given)
    if books.last is not None:
        if not books.started.exists():
            raise InputError(f"{work.checkpoints}: its checkpoints are not of a run in this output_dir: move them away or choose another")
        recorded = _of_recipe(read_json(books.started))
        require_same(work.checkpoints, recorded, given, work.recipe.model_name_or_path, _explained(work))
    limit = min(work.positions, keys.block_size)
    records = work.corpora.held_out(keys.max_items)
    held = corpus("held-out domain documents", records, work.encoder, limit, work.vocabulary(records))
    monitors = {"general": work.items(work.corpora.reporting(keys.max_items)), "domain": held.items}
    with books.nothing_left_by_a_refusal():
        if record is not None:
            metering = work.items(records) if (records := work.corpora.metering()) else ()
            steering = work.items(work.corpora.steering())
            tune_checkpoint(work.expanded, work.tuned, text, steering, monitors, settings, books, metering=metering, **work.loading)
            work.say(f"{work.tuned}: tuned; every original tensor is bit-equal to {work.expanded.name}/")
        else:
            method, rank = work.recipe.method, keys.lora_rank
            tune_baseline(work.source, work.tuned, method, text, monitors, settings, books, rank=rank, **work.loading)
            work.say(f"{work.tuned}: tuned by {method}, without copies")


def _due(work: Workspace, inputs: Mapping[str, Any]) -> bool:
    """Whether tuned/ is to be made, or made anew because the run goes on to another number of steps. Raises InputError, naming what
    differs, for one that was made with other settings."""
    if not work.tuned.exists():
        return True
    recorded = inputs_of(tuned_record(work.tuned))
    require_same(work.tuned, _compared(recorded), _compared(inputs), work.recipe.model_name_or_path, _explained(work))
    then, now = ({name: made.get(f"tune.{name}", known()[name][1]) for name in sorted(SCHEDULE)} for made in (recorded, inputs))
    schedule = [f"tune.{name}" for name, value in now.items() if value != then[name]]
    if not schedule:
        work.say(f"{work.tuned}: up to date")
        return False
    if not any(work.checkpoints.glob("checkpoint-*")):
        raise InputError(
            f"{work.tuned} was made with other settings ({', '.join(schedule)}), and {work.checkpoints} holds no checkpoint to go on from: "
            "choose another output_dir, or remove it to redo it"
        )
    anew = "it stands until training has gone on; then it, eval.json and the report are made anew"
    work.say(f"{work.tuned}: {', '.join(schedule)} changed: {anew}")
    return True


def _explained(work: Workspace) -> dict[str, str]:
    """What it means that these inputs differ."""
    if work.corpora.streamed:
        return {"domain": "what a source holds, how it is read, or what is held out or measured on"}
    return {"domain": "a row that was repaired, added or taken away makes another corpus, trained on in another order"}


def _compared(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for an artefact to be that of these settings: no setting that changes no bit, none at its default, the batch
    of a process however it is cut. What gives each step its learning rate is compared with the checkpoint."""
    names = {key: key.removeprefix("tune.") for key in inputs if key.startswith("tune.") and key.removeprefix("tune.") in known()}
    left = {key: value for key, value in inputs.items() if key not in names and key not in ("tune.extend", "extended")}
    changing = {key: inputs[key] for key, name in names.items() if changes_the_run(name) and inputs[key] != known()[name][1]}
    batch = math.prod(int(inputs.get(f"tune.{key}", 1)) for key in BATCH)
    return {**left, **changing, "tune.per_device_train_batch_size": batch}


def _of_recipe(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that are no TrainingArguments, which each checkpoint keeps itself."""
    return {key: value for key, value in inputs.items() if key.removeprefix("tune.") not in known()}


def tuned_record(folder: Path) -> AdeptConfig | dict[str, Any]:
    """What says how a checkpoint was tuned, by whatever method."""
    baseline = folder / "baseline.json"
    return read_json(baseline) if baseline.is_file() else AdeptConfig.load(folder)


def _inputs(work: Workspace, record: AdeptConfig | None) -> dict[str, Any]:
    tune, method = work.recipe.tune, work.method
    idle = {
        *(OF_RATES if not method.rates else ()),
        *(("refresh_steps",) if not method.copies else ()),
        *(("lora_rank",) if work.recipe.method != "lora" else ()),
        *(("anchor_every", "anchor_tokens") if tune.anchor_weight is None else ()),
        *(("general_action",) if tune.general_limit is None else ()),
    }
    inputs = {
        **work.base_inputs(),
        "method": work.recipe.method,
        **({} if record is None else work.copies_inputs([entry.copied_from for entry in record.inserted])),
        "domain": work.corpora.training().digest,
        "steering items": work.corpora.digest(work.corpora.steering()),
        **({} if tune.general_limit is None else {"metering items": work.corpora.digest(work.corpora.metering())}),
        "seed": work.recipe.seed,
        **{f"tune.{key}": value for key, value in vars(tune).items() if key not in ELSEWHERE and key not in idle},
        **{f"tune.{key}": value for key, value in tune.training.items()},
    }
    return json.loads(json.dumps(inputs, default=str))
