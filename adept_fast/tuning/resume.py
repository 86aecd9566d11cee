"""Decide whether a run may resume from a checkpoint: compare the settings that the checkpoint was made with with those given now.

A run may resume where every finished step would have been the same: equal settings, and an equal learning rate in each finished step. So
the number of steps may be raised under a constant rate, and under any schedule that gives the finished steps the same rates. Otherwise
`extend` accepts the difference, and every later checkpoint records that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import changed
from adept_fast.settings.argument_effects import changes_the_run
from adept_fast.settings.validation import shown

FILE = "adept_run.json"
MODEL, BATCH = "the frozen weights", "the global batch"
SAMPLED = 64  # values of each frozen tensor


class RestoresItself(ExportableState):
    """A callback that reads its own state from the checkpoint; transformers would construct it anew from JSON."""


@dataclass(frozen=True)
class RunRecord:
    """The settings of a run, stored in each of its checkpoints.

    made_with: settings that change the result. schedule, steps, warmup_steps: they determine each step's learning rate. annealed: whether
    the mixture of sources depends on the number of steps. extended: the changes of the number of steps so far.
    """

    made_with: Mapping[str, Any]
    schedule: Mapping[str, Any]
    steps: int
    warmup_steps: int
    annealed: bool = False
    extended: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, args: TrainingArguments, steps: int, annealed: bool = False, **others: Any) -> RunRecord:
        """Collect the settings of a run. others: further settings that change the result, by name."""
        named = {entry.name: getattr(args, entry.name, None) for entry in fields(TrainingArguments) if changes_the_run(entry.name)}
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        schedule = {name: getattr(args, name) for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")}
        made_with = {**named, BATCH: batch, **others}
        return cls(_plain(made_with), _plain(schedule), steps, args.get_warmup_steps(steps), annealed)

    @classmethod
    def load(cls, checkpoint: Path) -> RunRecord:
        """Read the record of a checkpoint. Raises InputError where it is missing or malformed."""
        path = checkpoint / FILE
        if not path.is_file():
            raise InputError(f"{path}: missing, so nothing says what {checkpoint.name} was made with: delete the checkpoint to start again")
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise InputError(f"{path}: no record of a run ({error}): delete the checkpoint to start again") from None

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / FILE, _plain(asdict(self)))

    def added_to(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a result, with the run's extensions where it has any."""
        return {**inputs, **({"extended": list(self.extended)} if self.extended else {})}

    def learning_rate(self) -> Callable[[int], float] | None:
        """Return the learning rate as a function of finished steps; None for a schedule that follows measurements."""
        base = self.made_with["learning_rate"]
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
        named, kwargs = self.schedule["lr_scheduler_type"], dict(self.schedule["lr_scheduler_kwargs"] or {})
        schedule = get_scheduler(named, optimizer, self.warmup_steps, self.steps, kwargs)
        return (lambda step: base * schedule.lr_lambdas[0](step)) if isinstance(schedule, LambdaLR) else None


def resumed_record(checkpoint: Path, now: RunRecord, extend: bool = False) -> RunRecord:
    """Return the record of a run that resumes from `checkpoint`: `now`, with the warmup steps of the run's beginning.

    extend: accept another learning rate in finished steps. Raises InputError, which names the difference and the
    way out, for a checkpoint that was made with other settings.
    """
    recorded, done = RunRecord.load(checkpoint), step_of(checkpoint)
    differing = changed(recorded.made_with, now.made_with)
    if MODEL in differing:
        raise InputError(f"{checkpoint} is of another model, or one in another dtype ({MODEL} differ): load the model it is from")
    if differing:
        pairs = ((name, recorded.made_with.get(name), now.made_with.get(name)) for name in differing)
        found = ", ".join(f"{name}: {shown(then)}, now {shown(given)}" for name, then, given in pairs)
        raise InputError(f"{checkpoint} was made with other settings ({found}): go on with those, or choose another output_dir", *differing)
    if now.steps < done:
        past = f"{checkpoint} is past the run's {now.steps:,} steps"
        raise InputError(f"{past}: give more (max_steps), or an earlier checkpoint", "max_steps")
    if recorded.schedule["warmup_steps"] == now.schedule["warmup_steps"]:
        now = replace(now, warmup_steps=recorded.warmup_steps)  # a share counts the steps that the run began with
    if replace(now, extended=recorded.extended) == recorded:
        return recorded
    then, there = recorded.learning_rate(), now.learning_rate()
    other = None if then is None or there is None else next((step for step in range(done) if then(step) != there(step)), None)
    if not extend:
        _refuse_other_rates(checkpoint, recorded, now, other)
    rates = [] if then is None or there is None else [then(done), there(done)]
    exact = other is None and not (now.annealed and now.steps != recorded.steps)
    entry = {"step": done, "steps": [recorded.steps, now.steps], "learning_rate": rates, "as_from_the_start": exact}
    return replace(now, extended=[*recorded.extended, entry])


def _refuse_other_rates(checkpoint: Path, recorded: RunRecord, now: RunRecord, other: int | None) -> None:
    """Raise InputError where a finished step would have been different. other: the first step with another learning rate."""
    done = step_of(checkpoint)
    accept = "extend=True goes on all the same"
    then, there = recorded.learning_rate(), now.learning_rate()
    if other is not None and then is not None and there is not None:
        kind = now.schedule["lr_scheduler_type"]
        raise InputError(
            f"{checkpoint}: {recorded.steps:,} steps became {now.steps:,}, and {kind} would have given step {other + 1:,} a learning rate "
            f"of {there(other):.3g}, not {then(other):.3g}: {accept}, the next one then {there(done):.3g} in place of {then(done):.3g}; "
            f"a checkpoint of step {other:,} or before goes on as it is",
            "extend",
        )
    if now.annealed and now.steps != recorded.steps:
        raise InputError(
            f"{checkpoint}: {recorded.steps:,} steps became {now.steps:,}, over which the shares of the sources move otherwise: {accept}",
            "extend",
        )


def checkpoint_of(given: str | bool | None, output_dir: str) -> Path | None:
    """Return the checkpoint that a Trainer is asked to resume from. Raises InputError where there is none."""
    if given is None or given is False:
        return None
    if given is True:
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise InputError(f"{output_dir}: holds no checkpoint to resume from: leave resume_from_checkpoint out to begin")
        return Path(last)
    path = Path(given)
    if not (path / TRAINER_STATE_NAME).is_file():
        if path.is_dir():
            raise InputError(f"{path / TRAINER_STATE_NAME}: missing: delete {path.name}, or give the folder of a whole checkpoint")
        raise InputError(f"{path}: no such folder: give one named {PREFIX_CHECKPOINT_DIR}-STEP")
    return path


def step_of(checkpoint: Path) -> int:
    step = read_json(checkpoint / TRAINER_STATE_NAME).get("global_step")
    if not isinstance(step, int):
        raise InputError(f"{checkpoint / TRAINER_STATE_NAME}: says no global_step: delete the checkpoint to start again")
    return step


def frozen_digest(model: nn.Module) -> str:
    """Digest what training does not change: names, shapes, dtypes and SAMPLED values of each frozen tensor.

    The digest is rank 0's on all processes. Of a sharded model it covers names, shapes and dtypes only.
    """
    sha = hashlib.sha256()
    whole = not in_shards(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            if whole and parameter.numel() and parameter.device.type != "meta":
                flat = parameter.detach().reshape(-1)
                at = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
                sha.update(flat[at.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
    return distributed.broadcast(sha.hexdigest())


def items_digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps([(list(item.input_ids), list(item.labels)) for item in items]).encode()).hexdigest()


def _plain(content: Any) -> Any:
    """Convert to what JSON reads back."""

    def named(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        return value.to_dict() if hasattr(value, "to_dict") else vars(value) if hasattr(value, "__dict__") else str(value)

    return json.loads(json.dumps(content, default=named))
