"""A Trainer that says what a run is made with, and goes on with one that was made alike: to the last step, or to more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from adept_fast.data.stream import Stream
from adept_fast.tuning import checkpoint_digests
from adept_fast.tuning.resume import MODEL, GoesOnByItself, RunRecord, checkpoint_of, frozen_digest, going_on, step_of

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PretrainedConfig


class ResumingTrainer(Trainer):
    """Trainer(model, args, ...) that goes on from a checkpoint only as it was made (see tuning/resume.py).

    extend: accept that a changed number of steps would have given the steps that are done another learning rate. named: what stands
    before settings in messages. The model's cache is off while it runs, as packed documents need it; its config is left, and saved, as it
    was. Evaluations leave the random state alone, and so change no trained bit.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, extend: bool = False, named: str = "", **kwargs: Any) -> None:
        self._extend, self._named = extend, named
        self._run: RunRecord | None = None
        self._users: dict[str, Any] | None = None  # fields of the model's config as they are outside of a run
        with self._without_cache(model):  # which transformers switches off for good
            super().__init__(model, args, **kwargs)
        self._frozen = frozen_digest(self.model)

    @contextmanager
    def _without_cache(self, model: nn.Module) -> Iterator[None]:
        """The model's config says use_cache=False inside, and behind it what it said."""
        before, self._users = self._users, self._users or vars(model.config).copy()
        model.config.use_cache = False
        try:
            yield
        finally:
            _put_back(model.config, self._users if before is None else {"use_cache": False})
            self._users = before

    @contextmanager
    def _users_config(self) -> Iterator[None]:
        """Inside, also of a run, the model's config says what it says outside of one."""
        if self._users is None:
            yield
            return
        _put_back(self.model.config, self._users)
        try:
            yield
        finally:
            self.model.config.use_cache = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer.train. Raises InputError for a checkpoint that is none, or that was made otherwise; one of the last step is loaded."""
        checkpoint = checkpoint_of(resume_from_checkpoint, self.args.output_dir)
        self._run = None
        if checkpoint is not None:
            self._run = self.goes_on(checkpoint)
            if step_of(checkpoint) >= self._run.steps:  # the Trainer would make one step more
                self._load_from_checkpoint(str(checkpoint))
                self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(self.state.global_step, 0.0, {})
        with self._without_cache(self.model):
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    @property
    def run(self) -> RunRecord:
        """What the run is made with that was trained last."""
        assert self._run is not None
        return self._run

    def goes_on(self, checkpoint: Path) -> RunRecord:
        """What a run that goes on from `checkpoint` is made with. Raises InputError where it was made otherwise."""
        checkpoint_digests.verify(checkpoint)
        return going_on(checkpoint, self._made_with(self._planned_steps()), self._extend, self._named)

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        with torch.random.fork_rng(devices=[]):
            return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _made_with(self, steps: int) -> RunRecord:
        data = self.train_dataset
        if isinstance(data, Stream):
            return RunRecord.of(self.args, steps, data.annealed, **self._settings())
        counted = {"the number of training examples": len(data)} if isinstance(data, Sized) else {}
        return RunRecord.of(self.args, steps, **self._settings(), **counted)

    def _settings(self) -> dict[str, Any]:
        """What makes another run, beside TrainingArguments."""
        return {MODEL: self._frozen}

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self._run = self._run or self._made_with(max_steps)
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # how often is logged, saved and evaluated: transformers would take the checkpoint's
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """With the warmup that the run began with, where it goes on with another number of steps."""
        if self.lr_scheduler is None and self._run is not None:
            given = self._run.warmup_steps, num_training_steps, self.args.lr_scheduler_kwargs
            self.lr_scheduler = get_scheduler(self.args.lr_scheduler_type, self.optimizer if optimizer is None else optimizer, *given)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate, leaving the random state alone: how often is evaluated changes no trained bit."""
        with self._aside():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._aside():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), self._without_cache(self.model):
            yield

    def _load_callback_state(self) -> None:
        """As the Trainer's, for callbacks that are not ours: these go on from the checkpoint by themselves."""
        kept = self.state.stateful_callbacks
        own = {type(callback).__name__ for callback in self.callback_handler.callbacks if isinstance(callback, GoesOnByItself)}
        self.state.stateful_callbacks = {name: state for name, state in kept.items() if name not in own}
        super()._load_callback_state()
        self.state.stateful_callbacks = kept

    def _take_the_new_rate(self) -> None:
        """The checkpoint's optimizer has what the schedule before gave the next step."""
        schedule = self.lr_scheduler
        given = [base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = given
        for group, rate in zip(getattr(self.optimizer, "optimizer", self.optimizer).param_groups, given, strict=True):
            group["lr"] = rate


def _put_back(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """use_cache as it stands among `fields`, or not at all."""
    if "use_cache" in fields:
        config.use_cache = fields["use_cache"]
    else:
        vars(config).pop("use_cache", None)
