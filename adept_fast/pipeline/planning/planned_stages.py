"""What a plan says, as plain values: `Plan.as_dict` is the JSON of `adept-fast plan json=true`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adept_fast.pipeline.planning.suggestions import Suggestion
from adept_fast.pipeline.planning.training_memory import TrainingMemory
from adept_fast.tuning.training_plan import Plan as TrainingPlan

DUE = ("to do", "begun")
STATES = (*DUE, "there", "not needed")


@dataclass(frozen=True)
class StageEstimate:
    """A stage of a run.

    state: one of STATES; "there" is what output_dir holds already and a run uses again. seconds: that it will take, None if it could not be
    timed. peak: bytes of memory at most, libraries included. parts: what the seconds are made of.
    """

    name: str
    state: str
    seconds: float | None = None
    peak: int | None = None
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will read, take and write.

    parameters: of the model, without copies. device: where it was timed. sources: what was read and for which purpose. held_out: what is,
    and by which rule. samples: documents as the model will see them. training: size of the tuning; None without a domain. layers: that are
    copied; assumed: until they are scored, evenly spaced ones stand in for them. shares: of full training, see scoring/budget.py.
    full_seconds: of full training on the same tokens. counted: memory of tuning, from shapes. capacity: bytes of memory of the device.
    written, free: bytes on the disk of output_dir.
    """

    model: str
    parameters: int
    dtype: str
    device: str
    sources: tuple[Mapping[str, Any], ...]
    held_out: str | None
    samples: tuple[str, ...]
    training: TrainingPlan | None
    method: str
    layers: tuple[int, ...]
    assumed: bool
    stages: tuple[StageEstimate, ...]
    shares: Mapping[str, float] | None
    full_seconds: float | None
    counted: TrainingMemory | None
    capacity: int
    written: int
    free: int
    suggestions: tuple[Suggestion, ...]
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Return the seconds of all stages that are left to do; None if one of them could not be timed."""
        due = [stage.seconds for stage in self.stages if stage.state in DUE]
        return None if None in due else sum(filter(None, due))

    @property
    def peak(self) -> int:
        """Return the peak memory of the run: that of its largest stage."""
        return max((stage.peak for stage in self.stages if stage.peak is not None), default=0)

    def as_dict(self) -> dict[str, Any]:
        training = None if self.training is None else {**asdict(self.training), "tokens": self.training.tokens}
        counted = None if self.counted is None else {**asdict(self.counted), "total": self.counted.total}
        warnings = [*filter(None, [self.training and self.training.warning]), *self.warnings]
        return {**asdict(self), "warnings": warnings, "training": training, "counted": counted, "seconds": self.seconds, "peak": self.peak}
