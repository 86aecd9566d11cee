"""The first stage of a run: scores.json, unit_scores.json, their pictures, and how certain the choice of layers is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from adept_fast.data.items import Item, tokenize
from adept_fast.models.decoder_layers import decoder_layers, text_config
from adept_fast.pipeline.choose_layers import check_layers, choose, race
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.recipe import Recipe, section
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.report.charts import measure_of
from adept_fast.report.drawing import save_png
from adept_fast.report.page import PICTURES
from adept_fast.report.units_chart import unit_profile
from adept_fast.runtime import distributed
from adept_fast.scoring.method_comparison import compare_scores
from adept_fast.scoring.race import certified
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.scores import LayerScores, UnitScores
from adept_fast.scoring.settings import LOSSES
from adept_fast.scoring.stability import corpus_conflicts, selection_stability
from adept_fast.scoring.unit_masking import forwards, mask_units, masked_units

Scores = TypeVar("Scores", LayerScores, UnitScores)

APART = ("compare", "units", "unit_layers")  # keys of score with artefacts of their own
DOMAIN_TOKENS = 256  # of each document of the domain that is scored

logger = logging.getLogger(__name__)


@section("score")
def score(recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory) -> LayerScores:
    """Write scores.json, and unit_scores.json if the recipe asks for it."""
    distributed.join()
    scoring = Scoring(recipe, source, data, directory)
    scores = scoring.made(directory.scores, LayerScores, scoring.layers)
    others = [scoring.other(method, scores) for method in recipe.score.compare]
    if distributed.is_main():
        scores = scoring.shown(scores, others)
    if recipe.score.units is not None:
        scoring.units()
    return scores


class Scoring:
    """Share model and items between the measurements of one stage. Both are loaded when the first measurement needs them."""

    def __init__(self, recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory) -> None:
        self.recipe, self.source, self.data, self.directory, self.keys = recipe, source, data, directory, recipe.score

    @cached_property
    def inputs(self) -> dict[str, Any]:
        data, keys = self.data, self.keys
        return {
            **self.source.inputs,
            "probe": data.digest(data.probe.scoring),
            **{f"score.{key}": value for key, value in vars(keys).items() if key not in APART},
            **({"score.domain": data.digest(data.domain_scoring())} if keys.domain_items else {}),
            **({"expand.k": self.recipe.expand.k} if keys.regret is not None else {}),
        }

    @cached_property
    def items(self) -> list[Item]:
        return self.data.items(self.data.scoring(), self.keys.probe_format)

    @property
    def loss(self) -> str:
        return self.keys.loss or ("kl" if self.source.tokenizer.chat_template else "answer")

    @property
    def losses(self) -> tuple[str, ...]:
        """Return the losses to measure beside the primary one."""
        keys = self.keys
        return LOSSES if keys.loss is None and keys.regret is None and keys.method == "masking" else ()

    def layers(self, **how: Any) -> LayerScores:
        """Return the layer scores of scores.json."""
        keys = self.keys
        check_layers(self.recipe, self.source)
        model = self.source.load()
        by = self.loss if keys.method == "masking" else keys.method
        logger.info(f"scoring {text_config(model).num_hidden_layers} layers on {len(self.items)} probe items by {by}")
        loss = self.loss if keys.method == "masking" or keys.loss else "answer"
        more: dict[str, Any] = {"losses": self.losses, "domain": self.domain_items(), "race": race(self.recipe)}
        scores = score_layers(model, self.items, keys.method, loss, **more, **how)
        if scores.certificate:
            logger.info(certified(scores.certificate))
        return scores

    def domain_items(self) -> list[Item]:
        """Return the first DOMAIN_TOKENS tokens of each domain document to score."""
        if not self.keys.domain_items:
            return []
        limit = min(DOMAIN_TOKENS, self.source.positions)
        return tokenize(self.data.domain_scoring(), self.source.encoder, limit=limit, overlong="cut").items

    def other(self, method: str, scores: LayerScores) -> LayerScores:
        """Write scores.METHOD.json: the same items scored by a cheap method."""
        path = self.directory.scores.with_name(f"scores.{method}.json")
        loss = scores.loss if scores.loss in ("answer", "all") else "answer"

        def measure(**how: Any) -> LayerScores:
            return score_layers(self.source.load(), self.items, method, loss, **how)

        return self.made(path, LayerScores, measure, {"score.method": method})

    def units(self) -> None:
        """Write unit_scores.json and its picture."""
        path, units, layers = self.directory.unit_scores, self.keys.units, self.keys.unit_layers
        scores = self.made(path, UnitScores, self._units, {"score.units": units, "score.unit_layers": layers and list(layers)})
        if distributed.is_main():
            save_png(unit_profile(scores), path.with_suffix(".png"))

    def _units(self, **how: Any) -> UnitScores:
        model, granularity, layers = self.source.load(), self.keys.units, self.keys.unit_layers
        assert granularity is not None
        units = masked_units(model, granularity, layers)
        cost = forwards(units, len(decoder_layers(model)))
        logger.info(f"masking {len(units)} units on {len(self.items)} probe items: the work of about {cost:.0f} forwards of the probe")
        return mask_units(model, self.items, granularity, self.loss, layers=layers, **how)

    def made(self, path: Path, kind: type[Scores], measure: Callable[..., Scores], more: Mapping[str, Any] | None = None) -> Scores:
        """Return the artefact at `path`; if there is none, write what `measure` finds. more: inputs beside those of all scores."""
        inputs, journal, keys = {**self.inputs, **(more or {})}, path.with_name(f".{path.stem}.journal"), self.keys
        if kept := self.directory.kept(path, kind.load, inputs, self.source.name):
            return kept
        found = measure(sweep_tokens=keys.sweep_tokens, seed=keys.seed, journal=journal, inputs=inputs)
        distributed.barrier()
        if distributed.is_main():
            found.save(path)
            parts = re.compile(rf"{re.escape(journal.name)}(\.domain)?(\.\d+)?")  # of each process
            for part in self.directory.folder.iterdir():
                if parts.fullmatch(part.name):
                    part.unlink()
        return found

    def shown(self, scores: LayerScores, others: list[LayerScores]) -> LayerScores:
        """Log and draw which layers the scores choose, and how certain the choice is."""
        path = self.directory.scores
        chosen = choose(self.recipe, self.source, scores, path)
        scores = self._analysed(scores, chosen, others)
        for name, draw in PICTURES.items():
            figure = draw(scores, chosen)
            if figure is not None:
                save_png(figure, self.directory.folder / name)
        values = ", ".join(f"{layer}: {scores.values[layer]:.3f}" for layer in chosen)
        logger.info(f"chosen layers ({measure_of(scores)}): {values}")
        return scores

    def _analysed(self, scores: LayerScores, chosen: list[int], others: list[LayerScores]) -> LayerScores:
        """Add what the losses of single items say about the choice, and save the scores if that is new."""
        if not scores.per_item:
            return scores
        expand, found = self.recipe.expand, {}
        others_may_be = expand.placement != "uniform" and len(chosen) < len(scores.candidates)
        if expand.layers is None and others_may_be:
            found["stability"] = selection_stability(scores, chosen, expand.placement)
            whole = found["stability"]["sizes"][-1]
            logger.info(f"of random probes of {whole['items']} such items {whole['same']:.0%} would choose the same layers")
        if "domain" in scores.profiles:
            found["conflicts"] = corpus_conflicts(scores, scores.loss, "domain")
            apart = ", ".join(map(str, found["conflicts"]["layers"])) or "none"
            logger.info(f"layers that probe and domain rank apart beyond their intervals: {apart}")
        if others:
            found["comparison"] = compare_scores([scores, *others])
        if found != scores.analysis:
            scores = replace(scores, analysis=found)
            scores.save(self.directory.scores)
        return scores
