"""Store a run's position in its stream in the Trainer's state file of each checkpoint, and log the shares of the sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from adept_fast.data.stream import Stream
from adept_fast.errors import InputError
from adept_fast.tuning.resume import RestoresItself
from adept_fast.tuning.trainer_log import TrainerLog

IN_ORDER = {"train_sampling_strategy": "sequential", "dataloader_num_workers": 0}  # each worker would read a stream of its own


class StreamPosition(TrainerCallback, RestoresItself):
    """Stores the stream's state after the blocks that were trained on (not those read ahead), and restores it from `checkpoint`.

    per_step: blocks of an optimizer step, over all processes and accumulated batches. log: receives with each loss the shares of several
    sources in the tokens drawn so far. changed: paths of sources that were changed since the checkpoint, beyond the position.
    """

    def __init__(self, stream: Stream, per_step: int, checkpoint: str | None = None, log: TrainerLog | None = None) -> None:
        self._stream, self._per_step, self._log, self._step = stream, per_step, log, 0
        self.changed: list[str] = []
        if checkpoint is not None:
            path = Path(checkpoint) / TRAINER_STATE_NAME
            kept = TrainerState.load_from_json(str(path)).stateful_callbacks.get(type(self).__name__)
            if kept is None:
                raise InputError(f"{path}: holds no position in the stream: delete the checkpoint to start again")
            self.changed = stream.load(kept["attributes"]["position"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        shares = self._stream.drawn(self._step * self._per_step)
        if self._log and state.is_world_process_zero and "loss" in (logs or {}) and len(shares) > 1:
            self._log.write("sources", state.global_step, shares=shares)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"position": self._stream.state(self._step * self._per_step)}}
