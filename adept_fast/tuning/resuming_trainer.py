"""A Trainer that records the settings of a run, and resumes one with equal settings, to its last step or to more steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from adept_fast.data.stream import Stream
from adept_fast.tuning import checkpoint_digests
from adept_fast.tuning.resume import MODEL, RestoresItself, RunRecord, checkpoint_of, frozen_digest, resumed_record, step_of

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PretrainedConfig, PreTrainedModel

    from adept_fast.optim import AdamW


class ResumingTrainer(Trainer):
    """A Trainer that resumes a checkpoint only with the settings that it was made with (see tuning/resume.py).

    extend: accept another number of steps where it would have given finished steps other learning rates. The model's KV cache is off in
    training, as packed documents need it; its config is restored afterwards and saved unchanged. Evaluations do not touch the random
    state, so they change no trained bit.
    """

    model: PreTrainedModel  # transformers declares it optional

    def __init__(self, model: nn.Module, args: TrainingArguments, *, extend: bool = False, **kwargs: Any) -> None:
        self._extend = extend
        self._run: RunRecord | None = None
        self._users: dict[str, Any] | None = None  # the fields of the user's config, while a run has changed it
        with self._without_cache(model):  # transformers sets use_cache=False and does not restore it
            super().__init__(model, args, **kwargs)
        self._frozen = frozen_digest(self.model)

    @contextmanager
    def _without_cache(self, model: Any) -> Iterator[None]:
        """Set use_cache=False in the model's config while inside."""
        before, self._users = self._users, self._users or vars(model.config).copy()
        model.config.use_cache = False
        try:
            yield
        finally:
            _restore_use_cache(model.config, self._users if before is None else {"use_cache": False})
            self._users = before

    @contextmanager
    def _users_config(self) -> Iterator[None]:
        """Restore the user's config while inside, also during a run."""
        if self._users is None:
            yield
            return
        _restore_use_cache(self.model.config, self._users)
        try:
            yield
        finally:
            self.model.config.use_cache = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer.train does. A checkpoint of the last step is only loaded.

        Raises InputError for a missing checkpoint, or one that was made with other settings.
        """
        checkpoint = checkpoint_of(resume_from_checkpoint, str(self.args.output_dir))
        self._run = None
        if checkpoint is not None:
            self._run = self.record_to_resume(checkpoint)
            if step_of(checkpoint) >= self._run.steps:  # the Trainer would run one step more
                self._load_from_checkpoint(str(checkpoint))
                self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(self.state.global_step, 0.0, {})
        with self._without_cache(self.model):
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    @property
    def run(self) -> RunRecord:
        """The record of the last training."""
        assert self._run is not None
        return self._run

    def record_to_resume(self, checkpoint: Path) -> RunRecord:
        """Return the record of a run that resumes from `checkpoint`. Raises InputError where its settings differ."""
        checkpoint_digests.verify(checkpoint)
        return resumed_record(checkpoint, self._made_with(self._planned_steps()), self._extend)

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        with torch.random.fork_rng(devices=[]):
            return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _made_with(self, steps: int) -> RunRecord:
        data = self.train_dataset
        if isinstance(data, Stream):
            return RunRecord.of(self.args, steps, data.annealed, **self._settings())
        counted: dict[str, Any] = {"the number of training examples": len(data)} if isinstance(data, Sized) else {}
        return RunRecord.of(self.args, steps, **self._settings(), **counted)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that change the result, beside TrainingArguments."""
        return {MODEL: self._frozen}

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self._run = self._run or self._made_with(max_steps)
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # transformers would log, save and evaluate at the checkpoint's intervals
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule, with the warmup steps of the run's beginning where it resumes."""
        if self.lr_scheduler is None and self._run is not None:
            stepped: Any = self.optimizer if optimizer is None else optimizer
            kwargs: Any = self.args.lr_scheduler_kwargs  # a string only until TrainingArguments has parsed it
            self.lr_scheduler = get_scheduler(self.args.lr_scheduler_type, stepped, self._run.warmup_steps, num_training_steps, kwargs)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer.evaluate does, without touching the random state."""
        with self._random_state_restored():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._random_state_restored():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _random_state_restored(self) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), self._without_cache(self.model):
            yield

    def _load_callback_state(self) -> None:
        """Let the Trainer restore its callbacks, except those that restore themselves."""
        state: Any = self.state  # transformers declares a list, and holds a table
        states = state.stateful_callbacks
        own = {type(callback).__name__ for callback in self.callback_handler.callbacks if isinstance(callback, RestoresItself)}
        state.stateful_callbacks = {name: value for name, value in states.items() if name not in own}
        super()._load_callback_state()
        state.stateful_callbacks = states

    @property
    def stepped(self) -> AdamW:
        """The optimizer inside accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _take_the_new_rate(self, schedule: LambdaLR) -> None:
        """Set the new schedule's learning rate; the checkpoint's optimizer has that of the earlier schedule."""
        given = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = given
        for group, rate in zip(self.stepped.param_groups, given, strict=True):
            group["lr"] = rate


def _restore_use_cache(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set use_cache to its value in `fields`, or delete it where they have none."""
    if "use_cache" in fields:
        config.use_cache = fields["use_cache"]
    else:
        vars(config).pop("use_cache", None)
