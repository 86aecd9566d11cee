"""Run a training, of copies or of a baseline: plan it, begin or resume it, and train to the last step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.model_card import FILE, write_card
from adept_fast.data.packing import Blocks
from adept_fast.data.stream import Stream
from adept_fast.errors import InputError
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import discard, write_json
from adept_fast.runtime.progress import Progress
from adept_fast.runtime.staging_folder import remove_leftovers
from adept_fast.tuning import checkpoint_digests
from adept_fast.tuning.collator import Collator, collator, isolates_documents
from adept_fast.tuning.forgetting_meter import stopped_in
from adept_fast.tuning.piece_losses import compare_pieces, warning
from adept_fast.tuning.resume import RunRecord, step_of
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.stream_position import IN_ORDER, StreamPosition
from adept_fast.tuning.trainer_log import TrainerLog
from adept_fast.tuning.training_plan import Plan, PlannedText
from adept_fast.tuning.tuning_settings import arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """The files of a training run.

    checkpoints: their folder; a killed run resumes from the last one. log: trainer_log.jsonl. inputs: for the record of the result.
    resume_inputs: the inputs that a resumed run must repeat, stored in `checkpoints` as inputs.json. card: makes the text of the result's
    model card from its record.
    """

    checkpoints: Path
    log: Path
    inputs: Mapping[str, Any] = field(default_factory=dict)
    resume_inputs: Mapping[str, Any] = field(default_factory=dict)
    card: Callable[[AdeptConfig | Mapping[str, Any]], str] | None = None

    @property
    def inputs_file(self) -> Path:
        return self.checkpoints / "inputs.json"

    @property
    def last(self) -> str | None:
        """The checkpoint to resume from."""
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None

    def write_card(self, folder: Path, record: AdeptConfig | Mapping[str, Any], earlier: Path) -> None:
        """Write the model card of the result in `folder`, which will replace `earlier`. A card edited there is kept."""
        if self.card is not None and not write_card(folder, self.card(record), earlier):
            logger.info(f"{earlier / FILE}: edited, so it stays as it is")

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """On an InputError before the first checkpoint remove the folder and the log that were made inside the context."""
        made = [path for path in (self.checkpoints, self.log) if not path.exists()]
        try:
            yield
        except InputError:
            if distributed.is_main() and self.last is None:
                for path in filter(Path.exists, made):
                    discard(path) if path.is_dir() else path.unlink()
            raise


@dataclass(frozen=True)
class Run:
    """A planned run: its blocks, their collator, its arguments, its log, and the checkpoint to resume from."""

    planned: Plan
    blocks: Blocks | Stream
    collate: Collator
    args: TrainingArguments
    files: RunFiles
    log: TrainerLog
    last: str | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def begin(
        cls,
        model: PreTrainedModel,
        folder: str | os.PathLike[str],
        text: PlannedText,
        files: RunFiles,
    ) -> Run:
        """Prepare to train `model`, loaded from `folder`, on `text`. Nothing is written yet."""
        settings, tokenizer = text.settings, text.encoder.tokenizer
        checkpoint.require_vocabulary(folder, tokenizer, model)
        collate = collator(model)
        if not isolates_documents(model, text.blocks.head() if isinstance(text.blocks, Stream) else text.blocks, collate):
            collate, text = default_data_collator, text.one_per_row()
            logger.warning(f"{model.config.model_type} leaks across packed documents, so it trains one document a row; {text.plan}")
        planned, blocks = text.plan, text.blocks
        if isinstance(blocks, Stream):
            settings = replace(settings, training={**settings.training, "max_steps": planned.steps, **IN_ORDER})
        args = arguments(settings, files.checkpoints, planned.steps)
        if args.world_size != distributed.world_size():
            found = f"{distributed.world_size()} processes run, transformers sees {args.world_size}"
            raise InputError(f"{found}: start them by accelerate launch, on CPUs with use_cpu=true", "use_cpu")
        if args.n_gpu > 1 and collate is not default_data_collator:  # torch's DataParallel would split the row
            raise InputError("flash attention on several GPUs takes a process for each: start them by accelerate launch")
        last = files.last
        if last is not None:
            checkpoint_digests.verify(Path(last))
            logger.info(f"resuming from {Path(last).name}")
        log = TrainerLog(files.log)
        if last is None:
            log.require_own()
            if line := warning(compare_pieces(model, blocks), text.encoder):
                logger.warning(line)
        return cls(planned, blocks, collate, args, files, log, last, tokenizer)

    @property
    def monitor_steps(self) -> int | None:
        return None if self.args.eval_steps is None else int(self.args.eval_steps)

    def finish(self, trainer: StagedTrainer) -> RunRecord:
        """Train to the last step, from the last checkpoint where there is one, and return the run's record."""
        files, planned = self.files, self.planned
        last = None if self.last is None else Path(self.last)
        done = 0 if last is None else step_of(last)
        extended = () if last is None else trainer.record_to_resume(last).extended
        if isinstance(self.blocks, Stream):
            position = StreamPosition(self.blocks, len(self.blocks) // planned.steps, self.last, self.log)
            trainer.add_callback(position)
            for path in position.changed:
                logger.warning(f"{path}: changed since, but not where it was read: going on with it as it is now")
        if distributed.rank() == 0:
            files.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(files.checkpoints)
            if last is None:
                write_json(files.inputs_file, files.resume_inputs)
                files.log.unlink(missing_ok=True)
                self._log_plan(0)
        if extended:
            self._report_extension(extended[-1], done)
        for callback in (PrinterCallback, ProgressCallback):  # the log has each step; only evaluations are printed
            trainer.remove_callback(callback)
        steps = _Steps()
        trainer.add_callback(steps)
        if last is None or (done < planned.steps and not stopped_in(last)):
            with steps:
                trainer.train(resume_from_checkpoint=self.last)
            if isinstance(self.blocks, Stream):
                self.blocks.encoder.warn_of_control_tokens("domain")  # a dataset from a hub was not checked before
            return trainer.run
        if done < planned.steps:
            logger.warning(f"{last.name}: general loss had passed general_limit there, so training does not go on")
        trainer._load_from_checkpoint(str(last))  # killed after the last step
        if distributed.rank() == 0:
            trainer.rotate(files.checkpoints, last)
            self.log.cut(done)
            self.log.write("end", done)
        return trainer.record_to_resume(last)

    def _report_extension(self, entry: Mapping[str, Any], done: int) -> None:
        before, now = entry["steps"]
        if entry["step"] != done or before == now == self.planned.steps:
            return
        course = "" if entry["as_from_the_start"] else ", which is not what as many from the start would have given (extend)"
        logger.info(f"going on from step {done:,}: {before:,} steps became {now:,}{course}")
        if distributed.rank() == 0:
            self.log.cut(done)
            if self.log.planned_steps() != now:
                self._log_plan(done)

    def _log_plan(self, step: int) -> None:
        planned = self.planned
        self.log.write("plan", step, steps=planned.steps, tokens=planned.tokens, epochs=planned.epochs, documents=planned.documents)


class _Steps(TrainerCallback):
    """Shows a progress bar of the steps. A context manager, which closes it."""

    bar: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = Progress(total=state.max_steps, initial=state.global_step, desc="tuning", unit="step", disable=bool(args.disable_tqdm))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
