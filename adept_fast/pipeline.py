"""The run: which stages are due, what each is made from, and where its artefact stands.

    scores.json scores.png -> expanded/ -> tuned/ trainer_log.jsonl -> eval.json -> report.html

An artefact records the inputs it was made from. One made from the same inputs is kept; one made from others is an error that names
what differs: nothing that was made is overwritten by another setting (eval.json and the report, made in minutes, are made again).
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast import checkpoint
from adept_fast.artefacts import read_json, remove_leftovers, write_json, write_text
from adept_fast.corpora import Corpora
from adept_fast.data.documents import Documents
from adept_fast.data.items import Item, tokenize_item
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.evaluation import EvaluationCorpus, corpus, evaluate
from adept_fast.expansion import expand_checkpoint, verify_expansion
from adept_fast.families import decoder_layers, describe, text_config
from adept_fast.importance import LayerScores, check_choice, score_layers, select_layers, undecided
from adept_fast.inputs import changed, digest, require_same
from adept_fast.recipe import Recipe
from adept_fast.record import AdeptConfig, versions
from adept_fast.report import layer_profile, save_png, write_report

if TYPE_CHECKING:
    from adept_fast.tuning import TuningSettings


class Pipeline:
    """Stages of one recipe in one output_dir. say: where one line of news goes; quiet: no progress bars."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print, quiet: bool | None = None) -> None:
        self.recipe, self.say, self.quiet = recipe, say, quiet
        self.folder = recipe.folder
        self.scores_path, self.expanded, self.tuned = self.folder / "scores.json", self.folder / "expanded", self.folder / "tuned"
        self.log, self.work, self.eval_path = self.folder / "trainer_log.jsonl", self.folder / "checkpoints", self.folder / "eval.json"
        self.corpora = Corpora(recipe)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make output_dir, keep other runs out of it, and clear what a killed one left half written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder}: output_dir is a file: choose another")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: another run is working in this output_dir") from None
            remove_leftovers(self.folder)
            yield

    @cached_property
    def source(self) -> Path:
        return checkpoint.resolve(self.recipe.model_name_or_path, self.recipe.revision)

    @cached_property
    def sha256(self) -> str:
        return checkpoint.fingerprint(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.source, self.recipe.trust_remote_code)

    @cached_property
    def positions(self) -> int:
        return checkpoint.positions(self.source)

    @property
    def loading(self) -> dict[str, Any]:
        return {key: getattr(self.recipe, key) for key in ("dtype", "attn_implementation", "trust_remote_code")}

    def _base_inputs(self) -> dict[str, Any]:
        return {"model": self.sha256, "dtype": self.recipe.dtype, "attn_implementation": self.recipe.attn_implementation}

    def _require_same(self, path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        require_same(path, recorded, now, self.recipe.model_name_or_path)

    def _items(self, records: Iterable[Record], style: str = "plain") -> list[Item]:
        """Tokenised items that fit the model; those that do not are left out and counted."""
        limit = self.positions
        items = [tokenize_item(record, self.tokenizer, style, self.recipe.probe.column) for record in records]
        fitting = [item for item in items if len(item.input_ids) <= limit and item.supervised]
        if not fitting:
            raise InputError(f"{self.recipe.probe.path}: no item with supervised tokens fits the model's {limit} positions")
        if len(fitting) < len(items):
            self.say(f"{len(items) - len(fitting)} of {len(items)} probe items are left out: too long for the model, or nothing supervised")
        return fitting

    # stage 1
    def _score_inputs(self) -> dict[str, Any]:
        score = self.recipe.score
        return {
            **self._base_inputs(),
            "probe": self.corpora.digest(self.corpora.probe.scoring),
            **{f"score.{key}": value for key, value in vars(score).items()},
        }

    def score(self) -> LayerScores:
        inputs = self._score_inputs()
        if self.scores_path.exists():
            scores = LayerScores.load(self.scores_path)
            self._require_same(self.scores_path, scores.inputs, inputs)
            self.say(f"{self.scores_path}: up to date")
        else:
            records = self.corpora.scoring()
            model = checkpoint.load_model(self.source, **self.loading)
            items = self._items(records, self.recipe.score.probe_format)
            loss = self.recipe.score.loss or ("kl" if self.tokenizer.chat_template else "answer")
            self.say(f"scoring {text_config(model).num_hidden_layers} layers on {len(items)} probe items by {loss}")
            journal = self.folder / ".scores.journal"
            scores = score_layers(
                model,
                items,
                self.recipe.score.method,
                loss,
                all_tokens=self.recipe.score.loss is None,
                seed=self.recipe.score.seed,
                journal=journal,
                inputs=inputs,
                quiet=self.quiet,
            )
            scores.save(self.scores_path)
            journal.unlink()
        chosen = self._chosen(scores)
        save_png(layer_profile(read_json(self.scores_path), chosen), self.folder / "scores.png")
        values = ", ".join(f"{layer}: {scores.values[layer]:.3f}" for layer in chosen)
        self.say(f"chosen layers ({scores.loss}, nats per token lost without each): {values}")
        return scores

    def _chosen(self, scores: LayerScores | None) -> list[int]:
        expand = self.recipe.expand
        if expand.layers is not None:
            return sorted(expand.layers)
        if scores is None:
            raise InputError(f"{self.scores_path}: no scores yet: run adept-fast score first, or set expand.layers")
        return select_layers(scores, expand.k, expand.placement)

    # expansion
    def expand(self) -> AdeptConfig:
        scores = LayerScores.load(self.scores_path) if self.scores_path.exists() else None
        if scores is not None and "model" in changed(scores.inputs, self._score_inputs()):
            self._require_same(self.scores_path, scores.inputs, self._score_inputs())
        layers = self._chosen(scores)
        steering = self.corpora.steering()
        inputs = {**self._base_inputs(), "expand.layers": layers, "steering items": self.corpora.digest(steering)}
        if self.expanded.exists():
            record = AdeptConfig.load(self.expanded)
            self._require_same(self.expanded, record.inputs, inputs)
            self.say(f"{self.expanded}: up to date")
            return record
        expand = self.recipe.expand
        selection: dict[str, Any] = {"placement": "given", "k": len(layers), "notes": []}
        if expand.layers is None and scores is not None:
            rivals = undecided(scores, layers, expand.placement)
            notes = [f"the intervals do not part the chosen layers from {', '.join(map(str, rivals))}"] if rivals else []
            values = [scores.values[layer] for layer in layers]
            selection |= {"placement": expand.placement, "method": scores.method, "loss": scores.loss, "scores": values, "notes": notes}
        for note in selection["notes"]:
            self.say(note)
        items = self._items(steering)
        record = expand_checkpoint(
            self.source, self.expanded, layers, steering=items, selection=selection, inputs=inputs, quiet=self.quiet, **self.loading
        )
        trainable, total = record.parameters["trainable"], record.parameters["total"]
        share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
        self.say(f"{self.expanded}: copies of layers {layers}; logits bit-equal; {share} will train")
        return record

    def verify(self) -> None:
        """Fresh loads of base and expanded: bit-equal logits."""
        self._need(self.expanded, "expand")
        record = AdeptConfig.load(self.expanded)
        if record.source.get("sha256") != self.sha256:
            raise InputError(f"{self.expanded} belongs to another model than {self.recipe.model_name_or_path}: choose another output_dir")
        verify_expansion(checkpoint.load_model(self.source, **self.loading), checkpoint.load_model(self.expanded, **self.loading))
        dtype = self.recipe.dtype or "its own dtype"
        self.say(f"{self.expanded}: logits bit-equal to {self.recipe.model_name_or_path} in {dtype}, cached decoding too")

    def _need(self, path: Path, stage: str) -> None:
        if not path.exists():
            raise InputError(f"{path}: missing: run adept-fast {stage} first (the same recipe), or adept-fast run for all stages")

    # stage 2
    @cached_property
    def documents(self) -> Documents:
        """The domain as tokens. What tuning is going to do with it is said when it is first asked for."""
        from adept_fast.tuning import plan

        training = self.corpora.training()
        documents = training.tokenize(self.tokenizer, self.quiet)
        planned, _ = plan(documents, training.weights, self._tuning_settings(), self.positions)
        for line in (str(planned), planned.warning):
            if line:
                self.say(line)
        return documents

    def _tuning_settings(self) -> TuningSettings:
        from adept_fast.tuning import TuningSettings

        tune = self.recipe.tune
        return TuningSettings(tune.units, tune.rate_map, tune.refresh_steps, tune.block_size, self.recipe.seed, tune.training)

    def tune(self) -> None:
        from adept_fast.tuning import tune_checkpoint

        self._need(self.expanded, "expand")
        tune = self.recipe.tune
        record = AdeptConfig.load(self.expanded)
        training = self.corpora.training()
        inputs = {
            **self._base_inputs(),
            "expand.layers": [entry.copied_from for entry in record.inserted],
            "domain": training.digest,
            "steering items": self.corpora.digest(self.corpora.steering()),
            "seed": self.recipe.seed,
            **{f"tune.{key}": value for key, value in vars(tune).items() if key not in ("training", "replay")},
            **{f"tune.{key}": value for key, value in tune.training.items()},
        }
        if self.tuned.exists():
            self._require_same(self.tuned, AdeptConfig.load(self.tuned).inputs, inputs)
            self.say(f"{self.tuned}: up to date")
            return
        _ = self.documents
        started = self.work / "inputs.json"
        if started.exists():
            self._require_same(self.work, read_json(started), inputs)
        write_json(started, json.loads(json.dumps(inputs, default=str)))
        limit = min(self.positions, tune.block_size)
        held = corpus("held-out domain documents", self.corpora.held_out(tune.max_items), self.tokenizer, limit)
        tune_checkpoint(
            self.expanded,
            self.tuned,
            self.documents,
            training.weights,
            self._items(self.corpora.steering()),
            {"general": self._items(self.corpora.reporting(tune.max_items)), "domain": held.items},
            self._tuning_settings(),
            work=self.work,
            log=self.log,
            inputs=inputs,
            say=self.say,
            quiet=bool(self.quiet),
            **self.loading,
        )
        self.say(f"{self.tuned}: tuned; every original tensor is bit-equal to the source")

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
        inputs = {**self._base_inputs(), **digests}
        if self.tuned.exists():
            inputs["tuned"] = digest(AdeptConfig.load(self.tuned).inputs)
        inputs["expanded"] = self.expanded.exists()
        if self.eval_path.exists():
            result = read_json(self.eval_path)
            differing = changed(result.get("inputs", {}), inputs)
            if "model" in differing:
                self._require_same(self.eval_path, result.get("inputs", {}), inputs)
            if not differing:
                self.say(f"{self.eval_path}: up to date")
                return result
        started = time.perf_counter()
        models: dict[str, Any] = {}
        models["base"], argmax = evaluate(checkpoint.load_model(self.source, **self.loading), general, domain, (), "base", self.quiet)
        if self.expanded.exists():
            models["expanded"] = {"same_as": "base", "reason": "logits bit-equal, verified when it was written"}
        if self.tuned.exists():
            models["tuned"], _ = evaluate(checkpoint.load_model(self.tuned, **self.loading), general, domain, argmax, "tuned", self.quiet)
        seconds = time.perf_counter() - started
        result = {"schema": 1, "models": models, "seconds": seconds, "inputs": inputs, "versions": versions()}
        write_json(self.eval_path, result)
        return result

    def report(self) -> Path:
        """report.html, and the resolved recipe beside it: recipe.yaml, which makes the run again."""
        if not any(path.exists() for path in (self.scores_path, self.expanded, self.eval_path)):
            raise InputError(f"{self.folder}: holds no artefacts to report: run adept-fast run first")
        import yaml

        kept = self.folder / "recipe.yaml"
        if self.recipe.model_name_or_path:
            write_text(kept, yaml.safe_dump(json.loads(json.dumps(self.recipe.as_dict())), sort_keys=False, allow_unicode=True))
        recipe = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept.exists() else self.recipe.as_dict()
        path = write_report(self.folder, recipe, versions())
        self.say(f"report: {path}")
        return path

    def _check(self) -> None:
        """Find what is wrong with model, corpora and settings before an hour of scoring."""
        from adept_fast.tuning import check_settings

        expand = self.recipe.expand
        check_settings(self._tuning_settings())
        skeleton = checkpoint.load_skeleton(self.source, self.recipe.trust_remote_code)
        describe(skeleton)
        check_choice(len(decoder_layers(skeleton)), expand.k, expand.placement, expand.layers)
        _ = self.corpora.probe, self._evaluation_corpora
        if not self.tuned.exists():
            _ = self.documents

    def run(self) -> dict[str, Any]:
        """All stages that are due, in order."""
        self._check()
        if self.recipe.expand.layers is None:
            self.score()
        self.expand()
        self.tune()
        result = self.evaluate()
        self.report()
        return result
