"""What output_dir holds already that a run of the recipe uses again, and what is left to do. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.pipeline.choose_layers import by_scores, choose, unscored
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.evaluate import EvaluationData
from adept_fast.pipeline.expand import kept_expansion
from adept_fast.pipeline.recipe import Recipe
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.score import Scoring
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.pipeline.tune import due
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import changed, inputs_of
from adept_fast.scoring.scores import LayerScores
from adept_fast.tuning.methods import METHODS
from adept_fast.tuning.resume import step_of


@dataclass(frozen=True)
class LeftToDo:
    """The state of each stage. Raises InputError for an artefact that was made with other settings.

    measured: what eval measures. tuned: whether the run tunes.
    """

    recipe: Recipe
    source: SourceModel
    data: Datasets
    directory: RunDirectory
    measured: EvaluationData
    tuned: bool

    @cached_property
    def scoring(self) -> Scoring:
        return Scoring(self.recipe, self.source, self.data, self.directory)

    @cached_property
    def scored(self) -> bool:
        """Whether the run needs scores."""
        return by_scores(self.recipe) or not self.tuned

    @cached_property
    def scores(self) -> LayerScores | None:
        """The scores that output_dir has."""
        return self.directory.kept(self.directory.scores, LayerScores.load, self.scoring.inputs, self.source.name) if self.scored else None

    @cached_property
    def copies(self) -> bool:
        return METHODS[self.recipe.method].copies

    @cached_property
    def assumed(self) -> bool:
        return self.copies and by_scores(self.recipe) and self.scores is None

    @cached_property
    def layers(self) -> list[int]:
        """The layers that are copied, evenly spaced ones where they are not known yet."""
        if not self.copies:
            return []
        return unscored(self.recipe, self.source) if self.assumed else choose(self.recipe, self.source, self.scores, self.directory.scores)

    @cached_property
    def expanded(self) -> AdeptConfig | None:
        """The record of the expanded model that output_dir has."""
        if self.assumed or not self.copies:
            return None
        return kept_expansion(self.recipe, self.source, self.data, self.directory, self.layers)

    @cached_property
    def finished(self) -> bool:
        """Whether tuned/ is there."""
        stands = self.directory.tuned.exists() and not self.assumed and (self.expanded is not None or not self.copies)
        return stands and not due(self.recipe, self.source, self.data, self.directory, self.expanded)

    @cached_property
    def done(self) -> int:
        """The steps of the last checkpoint."""
        folder = self.directory.checkpoints
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return 0 if last is None else step_of(Path(last))

    @property
    def evaluated(self) -> bool:
        """Whether eval.json measures what the recipe asks for."""
        path = self.directory.evaluation
        wanted = {**self.source.inputs, **self.measured.digests, "eval.general_limit": self.recipe.eval.general_limit}
        made = inputs_of(read_json(path)) if path.exists() else {}
        return not changed({name: made.get(name) for name in wanted}, wanted)

    @property
    def states(self) -> dict[str, str]:
        """The state of each stage, see pipeline/planning/planned_stages.py."""
        tune = "begun" if self.done else "to do"
        return {
            "score": "not needed" if not self.scored else "to do" if self.scores is None else "there",
            "expand": "not needed" if not self.copies else "to do" if self.expanded is None else "there",
            "tune": "not needed" if not self.tuned else "there" if self.finished else tune,
            "eval": "not needed" if not self.tuned else "there" if self.finished and self.evaluated else "to do",
        }
