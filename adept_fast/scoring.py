"""The first stage of a run: scores.json, how sure the choice of layers is, unit_scores.json, their pictures; and the choice itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adept_fast import checkpoint, distributed
from adept_fast.artefacts import read_json
from adept_fast.data.items import Item, tokenize_item
from adept_fast.errors import InputError
from adept_fast.families import decoder_layers, text_config
from adept_fast.importance import (
    CHEAP,
    LOSSES,
    LayerScores,
    Race,
    UnitScores,
    certified,
    check_budget,
    check_choice,
    compare_scores,
    corpus_conflicts,
    evenly,
    forwards,
    mask_units,
    masked_units,
    next_layer,
    score_layers,
    select_layers,
    selection_stability,
)
from adept_fast.record import AdeptConfig
from adept_fast.report import PICTURES, measure_of, save_png, unit_profile
from adept_fast.workspace import Workspace

APART = ("compare", "units", "unit_layers")  # keys of score with artefacts of their own
DOMAIN_TOKENS = 256  # of each document of the domain that is scored


class Scoring(Workspace):
    """Which layers to copy."""

    def _score_inputs(self) -> dict[str, Any]:
        score = self.recipe.score
        race = {"expand.k": self.recipe.expand.k} if score.regret is not None else {}
        return {
            **self.base_inputs(),
            "probe": self.corpora.digest(self.corpora.probe.scoring),
            **{f"score.{key}": value for key, value in vars(score).items() if key not in APART},
            **({"score.domain": self.corpora.digest(self.corpora.domain_scoring())} if score.domain_items else {}),
            **race,
        }

    def score(self) -> LayerScores:
        """scores.json, and unit_scores.json where the recipe asks for it."""
        distributed.join()
        scores = self._score_layers()
        self._score_units()
        return scores

    def _score_layers(self) -> LayerScores:
        inputs, journal = self._score_inputs(), self.folder / ".scores.journal"
        kept = self.scores_path.exists()
        if kept:
            scores = LayerScores.load(self.scores_path)
            self.require_same(self.scores_path, scores.inputs, inputs)
            self.say(f"{self.scores_path}: up to date")
        else:
            scores = self._measured(journal, inputs)
        others = [self._cheap(method, scores) for method in self.recipe.score.compare]
        distributed.wait()
        if not distributed.leads():
            return scores
        if not kept:
            scores.save(self.scores_path)
            self._forget(journal)
            for note in scores.notes:
                self.say(note)
            if scores.certificate:
                self.say(certified(scores.certificate))
        chosen = self._chosen(scores)
        scores = self._analysed(scores, chosen, others)
        content = read_json(self.scores_path)
        for name, draw in PICTURES.items():
            figure = draw(content, chosen)
            if figure is not None:
                save_png(figure, self.folder / name)
        values = ", ".join(f"{layer}: {scores.values[layer]:.3f}" for layer in chosen)
        self.say(f"chosen layers ({measure_of(content)}): {values}")
        return scores

    def _measured(self, journal: Path, inputs: dict[str, Any]) -> LayerScores:
        records, score = self.corpora.scoring(), self.recipe.score
        self._check_model()
        model = checkpoint.load_model(self.source, **self.loading)
        items = self.items(records, score.probe_format)
        by = self._loss if score.method == "masking" else score.method
        self.say(f"scoring {text_config(model).num_hidden_layers} layers on {len(items)} probe items by {by}")
        return score_layers(
            model,
            items,
            score.method,
            self._loss if score.method == "masking" or score.loss else "answer",
            losses=LOSSES if score.loss is None and self._race is None and score.method == "masking" else (),
            domain=self._domain_items(),
            race=self._race,
            sweep_tokens=score.sweep_tokens,
            seed=score.seed,
            journal=journal,
            inputs=inputs,
            quiet=self.quiet,
        )

    @property
    def _race(self) -> Race | None:
        score = self.recipe.score
        return None if score.regret is None else Race(self.recipe.expand.k, score.regret, score.confidence)

    @property
    def _loss(self) -> str:
        return self.recipe.score.loss or ("kl" if self.tokenizer.chat_template else "answer")

    def _forget(self, journal: Path) -> None:
        """Delete a journal of all processes."""
        for part in self.folder.glob(f"{journal.name}*"):
            part.unlink()

    def _score_units(self) -> None:
        score, path = self.recipe.score, self.folder / "unit_scores.json"
        if score.units is None:
            return
        inputs = {**self._score_inputs(), "score.units": score.units, "score.unit_layers": score.unit_layers and list(score.unit_layers)}
        if path.exists():
            found = UnitScores.load(path)
            self.require_same(path, found.inputs, inputs)
        else:
            model = checkpoint.load_model(self.source, **self.loading)
            items, units = self.items(self.corpora.scoring(), score.probe_format), masked_units(model, score.units, score.unit_layers)
            cost = forwards(units, len(decoder_layers(model)))
            self.say(f"masking {len(units)} units on {len(items)} probe items: the work of about {cost:.0f} forwards of the probe")
            journal = self.folder / ".unit_scores.journal"
            kept = {"journal": journal, "inputs": inputs, "quiet": self.quiet, "seed": score.seed, "sweep_tokens": score.sweep_tokens}
            found = mask_units(model, items, score.units, self._loss, layers=score.unit_layers, **kept)
            distributed.wait()
            if distributed.leads():
                found.save(path)
                self._forget(journal)
        if distributed.leads():
            save_png(unit_profile(read_json(path)), path.with_suffix(".png"))

    def _domain_items(self) -> list[Item]:
        """The first DOMAIN_TOKENS of each document of the domain to be scored."""
        if not self.recipe.score.domain_items:
            return []
        items = [tokenize_item(record, self.tokenizer) for record in self.corpora.domain_scoring()]
        limit = min(DOMAIN_TOKENS, self.positions)
        return [Item(item.input_ids[:limit], item.input_ids[:limit]) for item in items if len(item.input_ids) > 1]

    def _analysed(self, scores: LayerScores, chosen: list[int], others: list[LayerScores]) -> LayerScores:
        """With what single items tell of this choice; saved where that is new."""
        if not scores.per_item:
            return scores
        expand, found = self.recipe.expand, {}
        if expand.layers is None and self.earlier is None:
            found["stability"] = selection_stability(scores, chosen, expand.placement)
            whole = found["stability"]["sizes"][-1]
            self.say(f"of random probes of {whole['items']} such items {whole['same']:.0%} would choose the same layers")
        if "domain" in scores.profiles:
            found["conflicts"] = corpus_conflicts(scores, scores.loss, "domain")
            apart = ", ".join(map(str, found["conflicts"]["layers"])) or "none"
            self.say(f"layers that probe and domain rank apart beyond their intervals: {apart}")
        if others:
            found["comparison"] = compare_scores([scores, *others])
        if found != scores.analysis:
            scores = replace(scores, analysis=found)
            scores.save(self.scores_path)
        return scores

    def _cheap(self, method: str, scores: LayerScores) -> LayerScores:
        """Scores of the same items by another method, kept as scores.METHOD.json."""
        path = self.scores_path.with_name(f"scores.{method}.json")
        inputs = {**self._score_inputs(), "score.method": method}
        if path.exists():
            found = LayerScores.load(path)
            self.require_same(path, found.inputs, inputs)
            return found
        items = self.items(self.corpora.scoring(), self.recipe.score.probe_format)
        loss = scores.loss if scores.loss in ("answer", "all") else "answer"
        model = checkpoint.load_model(self.source, **self.loading)
        found = score_layers(model, items, method, loss, seed=self.recipe.score.seed, inputs=inputs, quiet=self.quiet)
        if distributed.leads():
            found.save(path)
        return found

    def _chosen(self, scores: LayerScores | None) -> list[int]:
        if self.recipe.expand.layers is not None:
            return sorted(self.recipe.expand.layers)
        if self.method.uniform:
            originals = range(self._layers) if self.earlier is None else self.earlier.originals
            return [originals[layer] for layer in evenly(len(originals), self.recipe.expand.k)]
        if scores is None:
            raise InputError(f"{self.scores_path}: no scores yet: run adept-fast score first, or set expand.layers")
        if self.earlier is None:
            return self._selected(scores)
        return [self.earlier.originals[layer] for layer in self._selected(scores.among(self.earlier.originals))]

    @cached_property
    def _layers(self) -> int:
        return len(decoder_layers(checkpoint.load_skeleton(self.source, self.recipe.trust_remote_code)))

    @cached_property
    def earlier(self) -> AdeptConfig | None:
        """The record of a model that is expanded already: its copies stay as they are, and are not copied."""
        return AdeptConfig.find(self.source)

    def _selected(self, scores: LayerScores) -> list[int]:
        expand = self.recipe.expand
        if expand.budget is not None:
            return select_layers(scores, placement=expand.placement, budget=expand.budget.shares)
        return select_layers(scores, expand.k, expand.placement)

    def _following(self, scores: LayerScores, layers: list[int]) -> dict[str, Any] | None:
        """What one more copy would cost and bring, of the layers that may be copied: see next_layer."""
        if self.earlier is None:
            return next_layer(scores, layers, self.recipe.expand.placement)
        places = self.earlier.originals
        found = next_layer(scores.among(places), [places.index(layer) for layer in layers], self.recipe.expand.placement)
        return found and {**found, **{key: [places[layer] for layer in found[key]] for key in ("layers", "joins")}}

    def _check_model(self) -> Any:
        """The model without its weights, whose layers the recipe must fit."""
        skeleton, expand = checkpoint.load_skeleton(self.source, self.recipe.trust_remote_code), self.recipe.expand
        if self.earlier is not None and self.recipe.score.regret is not None:
            raise InputError("score.regret: a race would count the copies that this model has already: score it without one")
        copied = len(self.earlier.copies) if self.earlier is not None and expand.layers is None else 0
        check_choice(len(decoder_layers(skeleton)) - copied, expand.k, expand.placement, expand.layers)
        if expand.budget is not None:
            check_budget(expand.budget.shares)
            if self.recipe.score.regret is not None:
                raise InputError("a race is for a given number of layers: give expand.k and no expand.budget, or no score.regret")
        if self._race is not None:
            self._race.check(len(decoder_layers(skeleton)))
        for method in self.recipe.score.compare:
            if method not in CHEAP:
                raise InputError(f"score.compare takes {', '.join(CHEAP)}, found {method!r}")
        return skeleton
