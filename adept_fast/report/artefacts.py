"""Read what an output_dir holds, each artefact typed and checked where it is read, so that a damaged one is named with its entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.runtime.input_files import as_input_error, read_json
from adept_fast.scoring.scores import LayerScores, UnitScores
from adept_fast.settings.typed_json import from_json
from adept_fast.settings.validation import require
from adept_fast.tuning.methods import METHODS, Method
from adept_fast.tuning.training_history import TrainingHistory

T = TypeVar("T")
EVALUATION, SCORES, UNITS, RECORD, LOG, RECIPE = (
    *("eval.json", "scores.json", "unit_scores.json", "expanded/adept_config.json", "trainer_log.jsonl", "recipe.yaml"),
)
MAKERS = {
    EVALUATION: ("the results and answers", "eval"),
    SCORES: ("the layer profile", "score"),
    RECORD: ("which layers were copied", "expand"),
    LOG: ("losses and unit rates over training", "tune"),
}
"""Artefact -> what the report lacks without it, and the command that makes it."""


@dataclass(frozen=True)
class Shares:
    """What copies take of full continual pretraining, by scoring/budget.py."""

    parameters: float
    time: float


@dataclass(frozen=True)
class NextCopy:
    """The layers that one more copy would add, with their scores, and the shares of all copies then."""

    layers: tuple[int, ...]
    joins: tuple[int, ...]
    scores: tuple[float | None, ...]
    shares: Shares


@dataclass(frozen=True)
class Selection:
    """How layers were chosen, as pipeline/choose_layers.py records it. layers: their indices in the model that was scored"""

    layers: tuple[int, ...] = ()
    placement: str | None = None
    notes: tuple[str, ...] = ()
    shares: Shares | None = None
    next: NextCopy | None = None


@dataclass(frozen=True)
class Artefacts:
    """What a run has left; None where it left nothing. missing: those of MAKERS that its method would have."""

    folder: Path
    model: str
    method: Method
    evaluation: EvaluationResults | None
    scores: LayerScores | None
    units: UnitScores | None
    record: AdeptConfig | None
    selection: Selection
    history: TrainingHistory
    missing: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path, recipe: Mapping[str, Any]) -> Self:
        """Read the artefacts of `folder`. Raises InputError for a malformed one."""

        def read(name: str, how: Callable[[Path], T]) -> T | None:
            return how(folder / name) if (folder / name).is_file() else None

        method = method_of(folder / RECIPE, recipe)
        scores = read(SCORES, lambda path: LayerScores.of(read_json(path), path))
        record = read(RECORD, lambda path: AdeptConfig.load(path.parent))
        unused = {*([SCORES] if method.uniform or not method.copies else []), *([] if method.copies else [RECORD])}
        names = recipe.get("model_name_or_path"), record and record.source.get("name_or_path"), scores and scores.model
        model = str(next(filter(None, names), "model"))
        return cls(
            folder=folder,
            model=model.rstrip("/").rpartition("/")[2] or model,
            method=method,
            evaluation=read(EVALUATION, EvaluationResults.load),
            scores=scores,
            units=read(UNITS, lambda path: UnitScores.of(read_json(path), path)),
            record=record,
            selection=_selection(folder / RECORD, record),
            history=TrainingHistory.load(folder / LOG),
            missing=tuple(name for name in MAKERS if name not in unused and not (folder / name).is_file()),
        )


def method_of(path: Path, recipe: Mapping[str, Any]) -> Method:
    """Return the method of a recipe, which was read from `path`. Raises InputError for one that there is not."""
    with as_input_error(path, "restore it, or run adept-fast run again, which keeps it"):
        name = recipe.get("method", "adept")
        require("method", name, str, METHODS)
        return METHODS[name]


def _selection(path: Path, record: AdeptConfig | None) -> Selection:
    found = {} if record is None else record.selection
    with as_input_error(path, "restore it, or expand the model again"):
        return from_json(Selection, {entry.name: found[entry.name] for entry in fields(Selection) if entry.name in found})
