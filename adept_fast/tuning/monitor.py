"""Monitor logs a training run and its held-out losses, in any transformers Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.losses import corpus_loss
from adept_fast.models.unwrap import bare
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.memory import peak
from adept_fast.settings.validation import require_table
from adept_fast.tuning.nonfinite_steps import NonFiniteSteps
from adept_fast.tuning.trainer_log import TrainerLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class Monitor(TrainerCallback):
    """Writes steps and held-out losses to trainer_log.jsonl, on rank 0 of several processes, and losses to the logger "adept_fast".

    monitors: name -> items whose mean loss is measured at the start, every `monitor_steps` and at the end; they influence nothing.
    log: the trainer_log.jsonl to write.
    tokens_per_step: for tokens/s in the log, without the time that callbacks take, and peak memory in bytes.
    skip_nonfinite: how many steps whose loss or gradient is not finite are skipped before one stops the run. tokenizer: shows their
    documents as text; default: the Trainer's processing_class.
    """

    def __init__(
        self,
        monitors: Mapping[str, Sequence[Item]] | None,
        monitor_steps: int,
        log: TrainerLog | None = None,
        tokens_per_step: int | None = None,
        skip_nonfinite: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        require_table("monitors", monitors)
        self.nonfinite, self.tokenizer = NonFiniteSteps(skip_nonfinite), tokenizer
        self.monitors, self.monitor_steps = dict(monitors or {}), monitor_steps
        for name, items in self.monitors.items():
            if not any(item.supervised for item in items):
                raise InputError(f"monitors: {name} has no item with a supervised token, so no mean loss")
        self.log, self.tokens_per_step = log, tokens_per_step
        self.track: Callable[[dict[str, float]], None] = lambda values: None  # set by a Trainer: sends values to its trackers
        self._timed: tuple[float, int] = (0.0, 0)
        self._skipped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._open_log(state)
        if not state.global_step:
            self._monitor(bare(model), 0)
        self._start_timer(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        with self._untimed():
            self._monitor_where_due(bare(model), state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            content: dict[str, Any] = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "epoch") if key in logs}
            if self._skipped and args.logging_steps == 1:  # transformers logs 0 for it, the mean of no other step
                content["loss"] = content["grad_norm"] = None
            now, steps, more = time.perf_counter(), state.global_step - self._timed[1], self._step_extras()
            if self.tokens_per_step and steps:
                more["tokens_per_second"] = self.tokens_per_step * steps / (now - self._timed[0])
                more["peak_memory"] = peak(args.device)
            self.track(more)
            if self.log:
                self.log.write("step", state.global_step, **content, **more)
        self._start_timer(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.log:
            self.log.write("end", state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Drop the gradients of a step that is not finite, after clipping; the optimizer then does nothing."""
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        self.nonfinite.decode = getattr(tokenizer, "decode", None)
        scaled = getattr(optimizer, "scaler", None) is not None
        self._skipped = self.nonfinite.skips(bare(model), state.global_step + 1, scaled)
        if self._skipped and self.log:
            self.log.write("skipped", state.global_step + 1, skipped=self.nonfinite.skipped)

    def _step_extras(self) -> dict[str, float]:
        """Return further entries for a step's line in the log."""
        return {}

    def _open_log(self, state: TrainerState) -> None:
        """Let rank 0 alone write. A resumed run's log is cut at its checkpoint; a new run's entries follow those of an earlier one."""
        skipped = self.log.count("skipped", state.global_step) if self.log and state.global_step else 0
        if not state.is_world_process_zero:
            self.log = None
        self.nonfinite.skipped = skipped
        if self.log and state.global_step:
            self.log.cut(state.global_step)
        elif self.log:
            self.log.begin()

    def _start_timer(self, step: int) -> None:
        self._timed = (time.perf_counter(), step)

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._timed = (self._timed[0] + time.perf_counter() - start, self._timed[1])

    def _monitor_where_due(self, model: PreTrainedModel, state: TrainerState, control: TrainerControl) -> None:
        step = state.global_step
        if step % self.monitor_steps == 0 or control.should_training_stop:
            self._monitor(model, step)

    def _monitor(self, model: PreTrainedModel, step: int) -> None:
        if not self.monitors:
            return
        losses = {name: _mean_loss(model, items, name) for name, items in self.monitors.items()}
        if self.log:
            self.log.write("evaluation", step, **{f"{name}_loss": loss for name, loss in losses.items()})
        self.track({f"eval_{name}_loss": loss for name, loss in losses.items()})
        logger.info(f"step {step}: " + ", ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items()))


def _mean_loss(model: PreTrainedModel, items: Sequence[Item], title: str) -> float:
    """Return the mean loss of items. Processes that hold the whole model share them."""
    if in_shards(model):
        return corpus_loss(model, items, title=title).mean
    found = corpus_loss(model, distributed.share(items), title=title)
    loss, tokens = distributed.total(torch.stack([found.sums.sum(), found.tokens.sum().double()]))
    return float(loss / tokens)
