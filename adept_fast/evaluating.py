"""The last stages of a run: eval.json, base against tuned and how far the dial can stay open, and report.html."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from adept_fast import checkpoint
from adept_fast.artefacts import read_json, read_yaml, write_json
from adept_fast.errors import InputError
from adept_fast.evaluation import EvaluationCorpus, corpus, evaluate, largest_alpha
from adept_fast.expansion import PRESERVING
from adept_fast.inputs import changed, digest
from adept_fast.record import AdeptConfig, versions
from adept_fast.report import write_report
from adept_fast.workspace import Workspace


class Evaluating(Workspace):
    """What was gained and what was lost."""

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
                self.require_same(path, {"model": self.inputs_of(path).get("model")}, {"model": self.identity})
        if self.tuned.exists():
            inputs["tuned"] = digest(self.inputs_of(self.tuned))
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
        kept = self.folder / "recipe.yaml"
        recipe = read_yaml(kept) if kept.exists() else self.recipe.as_dict()
        path = write_report(self.folder, recipe, versions())
        self.say(f"report: {path}")
        return path
