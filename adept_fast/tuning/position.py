"""Where a run stands in its stream, kept in the Trainer's own state file of each checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from adept_fast.data.stream import Stream
from adept_fast.errors import InputError

IN_ORDER = {"train_sampling_strategy": "sequential", "dataloader_num_workers": 0}  # workers would each keep the stream's order


class StreamPosition(TrainerCallback, ExportableState):
    """Writes the stream's state behind the blocks that were trained on, not those that were read ahead; sets it from `checkpoint`.

    per_step: blocks of an optimizer step, over all processes and accumulated batches.
    """

    def __init__(self, stream: Stream, per_step: int, checkpoint: str | None = None) -> None:
        self._stream, self._per_step, self._step = stream, per_step, 0
        if checkpoint is not None:
            path = Path(checkpoint) / TRAINER_STATE_NAME
            kept = TrainerState.load_from_json(str(path)).stateful_callbacks.get(type(self).__name__)
            if kept is None:
                raise InputError(f"{path}: holds no position in the stream: delete the checkpoint to start again")
            stream.load(kept["attributes"]["position"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"position": self._stream.state(self._step * self._per_step)}}
