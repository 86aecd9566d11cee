"""The third stage of a run: tuned/ and trainer_log.jsonl, by the recipe's method."""

from __future__ import annotations

import json
import math
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
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.runtime import distributed
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import require_same
from adept_fast.settings.keys import Tuning

if TYPE_CHECKING:
    from adept_fast.tuning import TuningSettings

ELSEWHERE = ("training", "replay", "streaming", "shuffle_window", "skip_nonfinite")
"""Keys of tune that the digest of the domain covers, that stand apart, or that change no bit until they let a run go on."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def tuning_settings(work: Workspace) -> TuningSettings:
    from adept_fast.tuning import TuningSettings

    tune = work.recipe.tune
    shared = {entry.name: getattr(tune, entry.name) for entry in fields(Tuning)}
    return TuningSettings(**shared, equal_rates=not work.method.rates, seed=work.recipe.seed)


def training_text(work: Workspace) -> WeightedDocuments | StreamedText:
    """What to train on, as tokens or to be streamed. Says what was read, shows two documents as the model will see them, and says what
    tuning is going to do."""
    from adept_fast.tuning import plan

    training = work.corpora.training()
    text = training if isinstance(training, StreamedText) else training.tokenize(work.encoder, work.quiet)
    planned, blocks = plan(text, work.encoder, tuning_settings(work), work.positions)
    summaries = work.corpora.summaries()
    unread = dict.fromkeys(line for _, summary in summaries[: len(work.corpora.trained_on)] for line in summary.keys_not_read())
    first, shown = (blocks, training.shown) if isinstance(blocks, Blocks) else (blocks.head(2), [0, 1])
    for line in [*table(summaries), *unread, *preview(first, shown, work.tokenizer)]:
        work.say(line)
    for line in (work.encoder.news("domain"), str(planned), planned.warning, work.recipe.unused):
        work.tell(line)
    return text


def tune(work: Workspace, text: WeightedDocuments | StreamedText | None = None) -> None:
    """tuned/ of expanded/, or of the base by a method without copies. text: what to train on, where it is at hand already."""
    from adept_fast.tuning import Bookkeeping, check_settings, tune_baseline, tune_checkpoint

    distributed.join()
    keys, record = work.recipe.tune, work.copies() if work.method.copies else None
    inputs = _inputs(work, record)
    if work.kept(work.tuned, tuned_record, inputs):
        return
    settings = tuning_settings(work)
    check_settings(settings)
    text = training_text(work) if text is None else text
    batch = distributed.processes() * math.prod(int(keys.training.get(key, 1)) for key in BATCH)  # of a step, however it is shared out
    given = {key: value for key, value in inputs.items() if key.removeprefix("tune.") not in BATCH} | {"global batch": batch}
    books = Bookkeeping(work.checkpoints, work.log, inputs, given, work.say, work.quiet)
    if books.started.exists():
        require_same(work.checkpoints, read_json(books.started), given, work.recipe.model_name_or_path)
    elif any(work.checkpoints.glob("checkpoint-*")):
        raise InputError(f"{work.checkpoints}: its checkpoints are not of a run in this output_dir: move them away or choose another")
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


def tuned_record(folder: Path) -> AdeptConfig | dict[str, Any]:
    """What says how a checkpoint was tuned, by whatever method."""
    baseline = folder / "baseline.json"
    return read_json(baseline) if baseline.is_file() else AdeptConfig.load(folder)


def _inputs(work: Workspace, record: AdeptConfig | None) -> dict[str, Any]:
    tune = work.recipe.tune
    inputs = {
        **work.base_inputs(),
        "method": work.recipe.method,
        **({} if record is None else work.copies_inputs([entry.copied_from for entry in record.inserted])),
        "domain": work.corpora.training().digest,
        "steering items": work.corpora.digest(work.corpora.steering()),
        "seed": work.recipe.seed,
        **{f"tune.{key}": value for key, value in vars(tune).items() if key not in ELSEWHERE},
        **{f"tune.{key}": value for key, value in tune.training.items()},
    }
    return json.loads(json.dumps(inputs, default=str))
