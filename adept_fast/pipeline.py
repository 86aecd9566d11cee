"""The run: which stages are due, what each is made from, and where its artefact stands.

    scores.json scores.png -> expanded/ -> tuned/ trainer_log.jsonl -> eval.json -> report.html

An artefact records the inputs it was made from. One made from the same inputs is kept; one made from others is an error that names
what differs: nothing that was made is overwritten by another setting (eval.json and the report, made in minutes, are made again).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast import checkpoint, distributed
from adept_fast.artefacts import read_json, write_json
from adept_fast.data.documents import WeightedDocuments
from adept_fast.data.stream import StreamedText
from adept_fast.errors import InputError
from adept_fast.evaluation import EvaluationCorpus, check_limit, corpus, evaluate, largest_alpha
from adept_fast.expansion import PRESERVING, check_initialisation, expand_checkpoint, largest_difference, verify_expansion
from adept_fast.families import describe
from adept_fast.importance import LayerScores, next_layer, undecided
from adept_fast.inputs import changed, digest
from adept_fast.record import AdeptConfig, versions
from adept_fast.report import write_report
from adept_fast.scoring import Scoring

if TYPE_CHECKING:
    from adept_fast.tuning import TuningSettings

ELSEWHERE = ("training", "replay", "streaming", "shuffle_window")  # keys of tune that the digest of the domain covers, or that stand apart


def tuned_inputs(folder: Path) -> Mapping[str, Any]:
    """What a tuned (or expanded) checkpoint was made from, whatever method made it."""
    plain = folder / "baseline.json"
    return read_json(plain).get("inputs", {}) if plain.is_file() else AdeptConfig.load(folder).inputs


class Pipeline(Scoring):
    """The stages of one recipe, each of which takes and leaves an artefact."""

    # expansion
    def expand(self) -> AdeptConfig:
        if not self.method.copies:
            raise InputError(f"method={self.recipe.method} trains no copies: there is nothing to expand")
        scores = LayerScores.load(self.scores_path) if self.scores_path.exists() else None
        if scores is not None and "model" in changed(scores.inputs, self._score_inputs()):
            self.require_same(self.scores_path, scores.inputs, self._score_inputs())
        layers = self._chosen(scores)
        steering = self.corpora.steering()
        inputs = {**self.base_inputs(), **self._initialisation, "expand.layers": layers, "steering items": self.corpora.digest(steering)}
        if self.expanded.exists():
            record = AdeptConfig.load(self.expanded)
            self.require_same(self.expanded, record.inputs, inputs)
            self.say(f"{self.expanded}: up to date")
            return record
        expand = self.recipe.expand
        selection: dict[str, Any] = {"placement": "uniform" if self.method.uniform else "given", "k": len(layers), "notes": []}
        if expand.layers is None and scores is not None and not self.method.uniform:
            copies = self.earlier.copies if self.earlier else ()
            rivals = [layer for layer in undecided(scores, layers, expand.placement) if layer not in copies]
            names = ", ".join(map(str, rivals))
            notes = [f"the intervals do not part the chosen layers from {names}: more probe items might"] if rivals else []
            values = [scores.values[layer] for layer in layers]
            selection |= {"placement": expand.placement, "method": scores.method, "loss": scores.loss, "scores": values, "notes": notes}
            if scores.costs is not None and self.earlier is None:
                selection["next"] = next_layer(scores, layers, expand.placement)
                selection["shares"] = scores.costs.shares(layers)
                self.say("shares of full training: parameters {parameters:.1%}, time {time:.0%} (modelled)".format(**selection["shares"]))
        items = self.items(steering)
        record = expand_checkpoint(
            self.source,
            self.expanded,
            layers,
            name=self.recipe.model_name_or_path,
            steering=items,
            initialisation=expand.initialisation,
            selection=selection,
            inputs=inputs,
            quiet=self.quiet,
            **self.loading,
        )
        for note in record.selection["notes"]:
            self.say(note)
        trainable, total = record.parameters["trainable"], record.parameters["total"]
        share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
        self.say(f"{self.expanded}: copies of layers {layers}; {_equality(record)}; {share} will train")
        return record

    @property
    def _initialisation(self) -> dict[str, str]:
        """Among the inputs, where it is not what it is by default."""
        how = self.recipe.expand.initialisation
        return {} if how == "zero_output" else {"expand.initialisation": how}

    def verify(self) -> None:
        """Fresh loads of base and expanded: bit-equal logits, or how far they differ where the initialisation is to change them."""
        self.need(self.expanded, "expand")
        record = self.require_ours(self.expanded)
        base, expanded = (checkpoint.load_model(folder, **self.loading) for folder in (self.source, self.expanded))
        if not PRESERVING[record.initialisation]:
            far = f"by up to {largest_difference(base, expanded):.3g} from those of {self.recipe.model_name_or_path}"
            self.say(f"{self.expanded}: {_equality(record)}: logits differ {far}")
            return
        verify_expansion(base, expanded)
        dtype = self.recipe.dtype or "its own dtype"
        self.say(f"{self.expanded}: logits bit-equal to {self.recipe.model_name_or_path} in {dtype}, cached decoding too")

    # stage 2
    @cached_property
    def training_corpus(self) -> WeightedDocuments | StreamedText:
        """What to train on, as tokens or to be streamed. What tuning is going to do with it is said when it is first asked for."""
        from adept_fast.tuning import plan

        training = self.corpora.training()
        corpus = training if isinstance(training, StreamedText) else training.tokenize(self.tokenizer, self.quiet)
        planned, _ = plan(corpus, self.tokenizer, self._tuning_settings(), self.positions)
        for line in (str(planned), planned.warning):
            if line:
                self.say(line)
        return corpus

    def _tuning_settings(self) -> TuningSettings:
        from adept_fast.tuning import TuningSettings

        tune = self.recipe.tune
        return TuningSettings(
            units=tune.units,
            rate_map=tune.rate_map,
            rate_floor=tune.rate_floor,
            rate_average=tune.rate_average,
            rate_conflict=tune.rate_conflict,
            equal_rates=not self.method.rates,
            refresh_steps=tune.refresh_steps,
            block_size=tune.block_size,
            seed=self.recipe.seed,
            anchor_weight=tune.anchor_weight,
            anchor_every=tune.anchor_every,
            anchor_tokens=tune.anchor_tokens,
            general_limit=tune.general_limit,
            general_action=tune.general_action,
            training=tune.training,
        )

    def _tune_inputs(self) -> dict[str, Any]:
        tune = self.recipe.tune
        layers: dict[str, Any] = {}
        if self.method.copies:
            self.need(self.expanded, "expand")
            copied = [entry.copied_from for entry in self.require_ours(self.expanded).inserted]
            layers = {"expand.layers": copied, **self._initialisation}
        inputs = {
            **self.base_inputs(),
            "method": self.recipe.method,
            **layers,
            "domain": self.corpora.training().digest,
            "steering items": self.corpora.digest(self.corpora.steering()),
            "seed": self.recipe.seed,
            **{f"tune.{key}": value for key, value in vars(tune).items() if key not in ELSEWHERE},
            **{f"tune.{key}": value for key, value in tune.training.items()},
        }
        return json.loads(json.dumps(inputs, default=str))

    def tune(self) -> None:
        from adept_fast.tuning import tune_baseline, tune_checkpoint

        distributed.join()
        tune, inputs = self.recipe.tune, self._tune_inputs()
        if self.tuned.exists():
            self.require_same(self.tuned, tuned_inputs(self.tuned), inputs)
            self.say(f"{self.tuned}: up to date")
            return
        _ = self.training_corpus
        started = self.work / "inputs.json"
        if started.exists():
            self.require_same(self.work, read_json(started), inputs)
        if distributed.leads():
            write_json(started, inputs)
        limit = min(self.positions, tune.block_size)
        held = corpus("held-out domain documents", self.corpora.held_out(tune.max_items), self.tokenizer, limit)
        monitors = {"general": self.items(self.corpora.reporting(tune.max_items)), "domain": held.items}
        aside = {"work": self.work, "log": self.log, "inputs": inputs, "say": self.say, "quiet": self.quiet, **self.loading}
        settings = self._tuning_settings()
        if self.method.copies:
            metering = self.items(records) if (records := self.corpora.metering()) else ()
            steering = self.items(self.corpora.steering())
            tune_checkpoint(self.expanded, self.tuned, self.training_corpus, steering, monitors, settings, metering=metering, **aside)
            self.say(f"{self.tuned}: tuned; every original tensor is bit-equal to {self.expanded.name}/")
        else:
            tune_baseline(
                self.source, self.tuned, self.recipe.method, self.training_corpus, monitors, settings, rank=tune.lora_rank, **aside
            )
            self.say(f"{self.tuned}: tuned by {self.recipe.method}, without copies")

    # evaluation
    @cached_property
    def _evaluation_corpora(self) -> tuple[dict[str, str], EvaluationCorpus, EvaluationCorpus | None]:
        """Digests, the general corpus, and the domain's where there is one."""
        limit = self.recipe.eval.max_items
        records = self.corpora.evaluation_general(limit)
        digests, domain = {"general": self.corpora.digest(records)}, None
        general = corpus("general", records, self.tokenizer, self.positions)
        if self.recipe.domain or self.recipe.eval.domain:
            records = self.corpora.held_out(limit)
            digests["domain"] = self.corpora.digest(records)
            domain = corpus("domain", records, self.tokenizer, self.positions)
        return digests, general, domain

    def evaluate(self) -> dict[str, Any]:
        """Base, expanded and tuned, as far as they exist. The expanded one is the base by proof, and not evaluated again."""
        digests, general, domain = self._evaluation_corpora
        limit = self.recipe.eval.general_limit
        inputs = {**self.base_inputs(), **digests, "eval.general_limit": limit}
        for path in (self.expanded, self.tuned):
            if path.exists():
                self.require_same(path, {"model": tuned_inputs(path).get("model")}, {"model": self.identity})
        if self.tuned.exists():
            inputs["tuned"] = digest(tuned_inputs(self.tuned))
        inputs["expanded"] = self.expanded.exists()
        if self.eval_path.exists():
            result = read_json(self.eval_path)
            differing = changed(result.get("inputs", {}), inputs)
            if "model" in differing:
                self.require_same(self.eval_path, result.get("inputs", {}), inputs)
            if not differing:
                self.say(f"{self.eval_path}: up to date")
                self._tell(result)
                return result
        started = time.perf_counter()
        models: dict[str, Any] = {}
        found: dict[str, Any] = {}
        models["base"], argmax = evaluate(checkpoint.load_model(self.source, **self.loading), general, domain, (), "base", self.quiet)
        if self.expanded.exists() and PRESERVING[AdeptConfig.load(self.expanded).initialisation]:
            models["expanded"] = {"same_as": "base", "reason": "logits bit-equal, verified when it was written"}
        elif self.expanded.exists():
            expanded = checkpoint.load_model(self.expanded, **self.loading)
            models["expanded"], _ = evaluate(expanded, general, domain, argmax, "expanded", self.quiet)
            del expanded
        if self.tuned.exists():
            tuned = checkpoint.load_model(self.tuned, **self.loading)
            models["tuned"], _ = evaluate(tuned, general, domain, argmax, "tuned", self.quiet)
            if limit is not None and self.method.copies:
                found = {"dial": largest_alpha(tuned, general, domain, limit, self.quiet)}
        seconds = time.perf_counter() - started
        result = {"schema": 1, "models": models, **found, "seconds": seconds, "inputs": inputs, "versions": versions()}
        write_json(self.eval_path, result)
        self._tell(result)
        return result

    def _tell(self, result: Mapping[str, Any]) -> None:
        models = result["models"]
        for name in ("domain", "general"):
            losses = [f"{model} {models[model][name]['loss']:.3f}" for model in ("base", "tuned") if name in models.get(model, {})]
            if losses:
                self.say(f"{name} loss: {' -> '.join(losses)} nats per token")
        if dial := result.get("dial"):
            there = f", domain loss {dial['domain_loss']:.3f}" if "domain_loss" in dial else ""
            self.say(
                f"alpha {dial['alpha']:g} is the largest share of the copies with general loss within {dial['limit']:g} nats of the base's "
                f"(it rises by {dial['rise']:.3f} [{dial['low']:.3f}, {dial['high']:.3f}]){there}: "
                f"adept-fast copies dial source={self.tuned} target=... alpha={dial['alpha']:g} writes it"
            )

    def report(self) -> Path:
        """report.html, with the recipe that `run` kept."""
        if not any(path.exists() for path in (self.scores_path, self.expanded, self.eval_path)):
            raise InputError(f"{self.folder}: holds no artefacts to report: run adept-fast run first")
        import yaml

        kept = self.folder / "recipe.yaml"
        recipe = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept.exists() else self.recipe.as_dict()
        path = write_report(self.folder, recipe, versions())
        self.say(f"report: {path}")
        return path

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


def _equality(record: AdeptConfig) -> str:
    if PRESERVING[record.initialisation]:
        return "logits bit-equal"
    return f"{record.initialisation} changes what the model computes"
