"""The run: which stages are due, in which order, and where each leaves its artefact.

    scores.json scores.png -> expanded/ -> tuned/ trainer_log.jsonl -> eval.json -> report.html

An artefact records the inputs it was made from. One made from the same inputs is kept; one made from others is an error that names
what differs: nothing that was made is overwritten by another setting (eval.json and the report, made in minutes, are made again).
"""

from __future__ import annotations

from typing import Any

from adept_fast import checkpoint
from adept_fast.evaluating import Evaluating
from adept_fast.evaluation import check_limit
from adept_fast.expanding import Expanding
from adept_fast.expansion import check_initialisation
from adept_fast.families import describe
from adept_fast.training import Training


class Pipeline(Expanding, Training, Evaluating):
    """The stages of one recipe, each of which takes and leaves an artefact."""

    def _check(self) -> None:
        """Find what is wrong with model, corpora and settings before an hour of scoring."""
        from adept_fast.tuning import check_settings

        check_settings(self._tuning_settings())
        check_initialisation(self.recipe.expand.initialisation)
        if self.recipe.eval.general_limit is not None:
            check_limit(self.recipe.eval.general_limit)
        skeleton = self._check_model()
        describe(skeleton)
        checkpoint.require_vocabulary(self.source, self.tokenizer, skeleton)
        _ = self.corpora.probe, self._evaluation_corpora
        if not self.tuned.exists():
            _ = self.training_corpus

    def run(self) -> dict[str, Any]:
        """All stages that are due, in order."""
        self._check()
        if self.method.copies:
            if self.recipe.expand.layers is None and not self.method.uniform:
                self.score()
            self.expand()
        self.tune()
        self.keep_recipe()
        result = self.evaluate()
        self.report()
        return result
