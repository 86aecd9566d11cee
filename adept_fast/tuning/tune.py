"""Stage 2: train the copies of an expanded checkpoint on packed domain documents, and write the tuned checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from adept_fast import checkpoint, distributed
from adept_fast.artefacts import remove_leftovers
from adept_fast.data.documents import WeightedDocuments
from adept_fast.data.items import Item
from adept_fast.data.stream import Stream, StreamedText
from adept_fast.errors import InputError
from adept_fast.expansion import export_tuned, load_first_importance
from adept_fast.tuning import sharded
from adept_fast.tuning.anchor import Anchor
from adept_fast.tuning.callback import AdeptCallback
from adept_fast.tuning.isolation import keeps_documents_apart
from adept_fast.tuning.log import TrainerLog
from adept_fast.tuning.meter import Meter, stopped_in
from adept_fast.tuning.plan import plan
from adept_fast.tuning.position import IN_ORDER, StreamPosition
from adept_fast.tuning.settings import TuningSettings, arguments
from adept_fast.tuning.trainer import AdeptTrainer


def tune_checkpoint(
    expanded: Path,
    target: Path,
    corpus: WeightedDocuments | StreamedText,
    steering: Sequence[Item],
    monitors: Mapping[str, Sequence[Item]],
    settings: TuningSettings,
    *,
    metering: Sequence[Item] = (),
    work: Path,
    log: Path,
    inputs: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **loading: Any,
) -> None:
    """Train and write `target` (a whole checkpoint in the source's dtype). A killed run goes on from its last checkpoint in `work`.

    corpus: what is trained on, in memory or read while it trains. monitors: held-out items, name -> items, whose loss is logged.
    metering: held-back general items, on which forgetting is measured and foretold.
    Raises InputError for settings that do not fit and ExpansionError when training reached what it must not touch.
    """
    model = checkpoint.load_model(expanded, **loading)
    tokenizer = checkpoint.load_tokenizer(expanded)
    checkpoint.require_vocabulary(expanded, tokenizer, model)
    positions = checkpoint.positions(expanded)
    planned, blocks = plan(corpus, tokenizer, settings, positions)
    if not keeps_documents_apart(model, blocks.head() if isinstance(blocks, Stream) else blocks):
        planned, blocks = plan(corpus, tokenizer, settings, positions, one_per_row=True)
        say(f"{model.config.model_type} leaks across packed documents, so it trains one document a row; {planned}")
    events = TrainerLog(log)
    leads = distributed.rank() == 0
    if work.is_dir() and leads:
        remove_leftovers(work)
    distributed.wait()
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    if last is None and leads:
        log.unlink(missing_ok=True)
        events.write("plan", 0, steps=planned.steps, tokens=planned.tokens, epochs=planned.epochs, documents=planned.documents)
    if last is not None:
        say(f"resuming from {Path(last).name}")
    if settings.general_limit is not None and not metering:
        raise InputError("tune.general_limit: the probe is too small to hold items back for it: give a probe of 20 items or more")
    anchor = None
    if settings.anchor_weight is not None:
        anchor = Anchor(steering, settings.anchor_weight, settings.anchor_every, settings.anchor_tokens)
    adept = AdeptCallback(
        steering,
        settings.units,
        settings.refresh_steps,
        settings.rates,
        first=load_first_importance(expanded),
        monitors=monitors,
        anchor=anchor,
        meter=Meter(metering, settings.general_limit, settings.general_action) if metering else None,
        log=events,
        tokens_per_step=planned.tokens_per_step,
        say=say,
        quiet=quiet,
    )
    if isinstance(blocks, Stream):
        settings = replace(settings, training={**settings.training, "max_steps": planned.steps, **IN_ORDER})
    trainer = AdeptTrainer(model, arguments(settings, work, quiet), adept=adept, train_dataset=blocks)
    if isinstance(blocks, Stream):
        trainer.add_callback(StreamPosition(blocks, len(blocks) // planned.steps, last))
    trainer.remove_callback(PrinterCallback)  # each step stands in the log; what is printed are the evaluations
    if last is not None and (_step(last) >= planned.steps or stopped_in(Path(last))):  # killed after the last step: it would make one more
        trainer._load_from_checkpoint(last)
        if leads:
            events.cut(_step(last))
            events.write("end", _step(last))
    else:
        trainer.train(resume_from_checkpoint=last)
    state = sharded.gathered(trainer.model) if sharded.shards(trainer.model) else model.state_dict()
    if leads:
        remote = bool(loading.get("trust_remote_code", False))
        export_tuned(expanded, target, state, inputs=inputs, quiet=quiet, trust_remote_code=remote)
    distributed.wait()


def _step(folder: str) -> int:
    return int(folder.rpartition("-")[2])
