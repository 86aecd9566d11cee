"""Stage 2: train the copies of an expanded checkpoint on packed domain documents, and write the tuned checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.one_model import OneModel
from adept_fast.data.items import Item
from adept_fast.expansion.export import export_tuned
from adept_fast.expansion.first_importance import load_first_importance
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import replaced_folder
from adept_fast.runtime.dtensor import in_shards
from adept_fast.tuning import sharded_checkpoint
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.kl_anchor import Anchor
from adept_fast.tuning.training_plan import PlannedText
from adept_fast.tuning.training_run import Run, RunFiles
from adept_fast.tuning.tuning_settings import check_meter


def tune_checkpoint(
    expanded: Path,
    target: Path,
    text: PlannedText,
    steering: Sequence[Item],
    monitors: Mapping[str, Sequence[Item]],
    files: RunFiles,
    *,
    metering: Sequence[Item] = (),
    models: OneModel | None = None,
    **loading: Any,
) -> None:
    """Train the copies of `expanded`, and write `target`, a whole checkpoint in the source's dtypes.

    A killed run resumes from its last checkpoint, and so does a finished one that is given more steps; an earlier `target` stays until
    the new one is complete. text: what to train on, as `plan` returns it. steering: items that set the unit rates. monitors: name ->
    held-out items whose loss is logged. metering: held-back general items for the forgetting meter. models: loads the model, in
    place of `loading`. Raises InputError for settings that do not fit, ExpansionError where training changed a tensor outside the
    copies.
    """
    models, settings = models or OneModel(**loading), text.settings
    check_meter(settings, metering)
    model = models.take(expanded)
    run = Run.begin(model, expanded, text, files)
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
        monitor_steps=run.monitor_steps,
        anchor=anchor,
        meter=Meter(metering, settings.general_limit, settings.general_action) if metering else None,
        log=run.log,
        tokens_per_step=run.planned.tokens_per_step,
        skip_nonfinite=settings.skip_nonfinite,
        tokenizer=run.tokenizer,
    )
    given = {"train_dataset": run.blocks, "data_collator": run.collate, "extend": settings.extend}
    trainer = AdeptTrainer(model, run.args, adept=adept, **given)
    made_with = run.finish(trainer)
    state = sharded_checkpoint.gathered(trainer.model) if in_shards(trainer.model) else model.state_dict()
    if distributed.rank() == 0:
        with replaced_folder(target) as new:
            inputs = made_with.added_to(files.inputs)
            record = export_tuned(expanded, new, state, inputs=inputs, trust_remote_code=models.trust_remote_code)
            files.write_card(new, record, target)
    distributed.barrier()
