"""The third stage of a run: tuned/ and trainer_log.jsonl, by the recipe's method."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adept_fast import distributed
from adept_fast.artefacts import read_json
from adept_fast.data.documents import WeightedDocuments
from adept_fast.data.stream import StreamedText
from adept_fast.evaluation import corpus
from adept_fast.workspace import Workspace

if TYPE_CHECKING:
    from adept_fast.tuning import TuningSettings

ELSEWHERE = ("training", "replay", "streaming", "shuffle_window")  # keys of tune that the digest of the domain covers, or that stand apart
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


class Training(Workspace):
    """What trains the copies, or the base where the method makes none."""

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
        shared = {entry.name: getattr(tune, entry.name) for entry in fields(TuningSettings) if hasattr(tune, entry.name)}
        return TuningSettings(**shared, equal_rates=not self.method.rates, seed=self.recipe.seed)

    def _tune_inputs(self) -> dict[str, Any]:
        tune = self.recipe.tune
        layers: dict[str, Any] = {}
        if self.method.copies:
            self.need(self.expanded, "expand")
            copied = [entry.copied_from for entry in self.require_ours(self.expanded).inserted]
            layers = self.copies_inputs(copied)
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
        from adept_fast.tuning import Bookkeeping, tune_baseline, tune_checkpoint

        distributed.join()
        tune, inputs = self.recipe.tune, self._tune_inputs()
        if self.tuned.exists():
            self.require_same(self.tuned, self.inputs_of(self.tuned), inputs)
            self.say(f"{self.tuned}: up to date")
            return
        _ = self.training_corpus
        batch = distributed.processes() * math.prod(int(tune.training.get(key, 1)) for key in BATCH)  # of a step, however it is shared out
        given = {key: value for key, value in inputs.items() if key.removeprefix("tune.") not in BATCH} | {"global batch": batch}
        books = Bookkeeping(self.work, self.log, inputs, given, self.say, self.quiet)
        if books.started.exists():
            self.require_same(self.work, read_json(books.started), given)
        limit = min(self.positions, tune.block_size)
        held = corpus("held-out domain documents", self.corpora.held_out(tune.max_items), self.tokenizer, limit)
        monitors = {"general": self.items(self.corpora.reporting(tune.max_items)), "domain": held.items}
        settings = self._tuning_settings()
        if self.method.copies:
            metering = self.items(records) if (records := self.corpora.metering()) else ()
            steering = self.items(self.corpora.steering())
            tune_checkpoint(
                self.expanded, self.tuned, self.training_corpus, steering, monitors, settings, books, metering=metering, **self.loading
            )
            self.say(f"{self.tuned}: tuned; every original tensor is bit-equal to {self.expanded.name}/")
        else:
            method, rank = self.recipe.method, tune.lora_rank
            tune_baseline(self.source, self.tuned, method, self.training_corpus, monitors, settings, books, rank=rank, **self.loading)
            self.say(f"{self.tuned}: tuned by {method}, without copies")
