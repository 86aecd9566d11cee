"""Read trainer_log.jsonl for charts and tables: the curves, rates and totals of its last run, each checked by type."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from adept_fast.errors import InputError
from adept_fast.settings.validation import shown
from adept_fast.tuning.trainer_log import read_log

LOSS = "_loss"


@dataclass(frozen=True)
class Curve:
    """A loss over steps, nats per token; NaN where the log has null."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Refresh:
    """The learning-rate multiplier of each unit from `step` on; NaN where the log has null."""

    step: int
    rates: Mapping[str, float]


@dataclass(frozen=True)
class MeterReading:
    """The measured rise of general loss since the start, and the predictions of each unit since the last reading (forgetting_meter.py)."""

    step: int
    rise: float
    predicted: Mapping[str, float]
    bound: Mapping[str, float]


@dataclass(frozen=True)
class TrainingHistory:
    """The last run of a trainer_log.jsonl.

    plan: its numbers (steps, tokens, epochs, documents), as far as they were logged
    training: the loss of each logged step. monitored: name ("general", "domain", ...) -> the losses measured during training
    done: the last step. ended: whether the run reached its end. seconds: None where the log does not say
    speed: median tokens per second. peak_memory: bytes. skipped: steps whose gradients were not finite
    """

    plan: Mapping[str, float] = field(default_factory=dict)
    training: Curve = Curve()
    monitored: Mapping[str, Curve] = field(default_factory=dict)
    refreshes: tuple[Refresh, ...] = ()
    readings: tuple[MeterReading, ...] = ()
    done: int = 0
    ended: bool = False
    seconds: float | None = None
    speed: float | None = None
    peak_memory: float | None = None
    skipped: int = 0

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a log; one without a file is empty. Raises InputError, which names line and key, for what no run writes."""
        lines = [_Line(f"{path}:{count}", entry) for count, entry in enumerate(read_log(path), 1)]
        begun = max((index for index, line in enumerate(lines) if line.event == "begin"), default=0)
        lines = lines[begun:]
        of = {event: [line for line in lines if line.event == event] for event in {line.event for line in lines}}
        measured = of.get("evaluation", [])
        names = dict.fromkeys(key.removesuffix(LOSS) for line in measured for key in line.entry if key.endswith(LOSS))
        speeds, peaks = (
            [value for line in of.get("step", []) if (value := line.number(key)) and math.isfinite(value)]
            for key in ("tokens_per_second", "peak_memory")
        )
        plan = of["plan"][-1] if "plan" in of else None
        return cls(
            plan={} if plan is None else plan.numbers("steps", "tokens", "epochs", "documents"),
            training=_curve(of.get("step", []), "loss"),
            monitored={name: _curve(measured, name + LOSS) for name in names},
            refreshes=tuple(Refresh(line.step, rates) for line in of.get("refresh", []) if (rates := line.table("rates"))),
            readings=tuple(
                MeterReading(line.step, line.value("meter_rise"), line.table("meter_predicted"), line.table("meter_bound"))
                for line in of.get("forgetting", [])
            ),
            done=max((line.step for line in lines), default=0),
            ended="end" in of,
            seconds=next((line.number("seconds") for line in of.get("end", [])), None),
            speed=statistics.median(speeds) if speeds else None,
            peak_memory=max(peaks, default=None),
            skipped=len(of.get("skipped", [])),
        )


class _Line:
    def __init__(self, where: str, entry: Mapping[str, Any]) -> None:
        self.where, self.entry = where, entry
        self.event: str = entry["event"]
        self.step: int = entry["step"]

    def number(self, key: str) -> float | None:
        """Return a number of the line; None where it is null or missing."""
        return self._checked(key, self.entry.get(key))

    def value(self, key: str) -> float:
        """Return a number of the line; NaN where it is null or missing."""
        found = self.number(key)
        return math.nan if found is None else found

    def numbers(self, *keys: str) -> dict[str, float]:
        return {key: value for key in keys if (value := self.number(key)) is not None}

    def table(self, key: str) -> dict[str, float]:
        """Return a table of units -> numbers, with NaN for null; an empty one where it is missing."""
        found = self.entry.get(key)
        if not isinstance(found, Mapping | None):
            raise InputError(f"{self.where}: {key} is no table, but {shown(found)}: remove that line")
        checked = {name: self._checked(f"{key}.{name}", value) for name, value in (found or {}).items()}
        return {name: math.nan if value is None else value for name, value in checked.items()}

    def _checked(self, key: str, value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise InputError(f"{self.where}: {key} is no number, but {shown(value)}: remove that line")
        return value


def _curve(lines: Sequence[_Line], key: str) -> Curve:
    holding = [line for line in lines if key in line.entry]
    return Curve(tuple(line.step for line in holding), tuple(line.value(key) for line in holding))
