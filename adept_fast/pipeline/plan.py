"""Say what a run of a recipe will do, before anything runs: what it reads and reuses, and each stage's time and memory.

Nothing is written to output_dir. The model is loaded and works for some seconds; the rest is counted from that (pipeline/planning/).
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.data.splits import HELD_OUT
from adept_fast.evaluation.generation import BATCH
from adept_fast.evaluation.results import FEWEST_ITEMS
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.models.decoder_layers import decoder_layers, text_config
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.evaluate import EvaluationData, evaluation_data
from adept_fast.pipeline.left_to_do import LeftToDo
from adept_fast.pipeline.planning import estimates
from adept_fast.pipeline.planning.estimates import Machine, ScoringWork, TuningWork
from adept_fast.pipeline.planning.planned_stages import DUE, Plan, StageEstimate
from adept_fast.pipeline.planning.suggestions import FULL, Facts, Suggestion, suggest
from adept_fast.pipeline.planning.text import shown
from adept_fast.pipeline.planning.timing import Timed, TimedSteps, time_answers, time_forward, time_writing, timed
from adept_fast.pipeline.planning.training_memory import TrainingMemory, kept_by_layer, training_memory
from adept_fast.pipeline.recipe import Recipe
from adept_fast.pipeline.run import check, opened
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.pipeline.tune import monitors, planned_text, samples, tuning_settings
from adept_fast.runtime.memory import capacity
from adept_fast.scoring.budget import LayerCosts
from adept_fast.tuning.baselines import prepare
from adept_fast.tuning.training_plan import PlannedText
from adept_fast.tuning.tuning_settings import arguments


def plan(recipe: Recipe, directory: RunDirectory) -> Plan:
    """Plan a run; without a domain, scoring and expansion alone. Raises InputError for what the run would refuse."""
    imported, start = time.process_time(), time.perf_counter()
    directory.require_free_names()
    source, data = opened(recipe)
    check(recipe, source, data, directory)
    evaluated = evaluation_data(recipe, source, data)
    text = planned_text(recipe, source, data) if recipe.domain else None
    reading = imported + time.perf_counter() - start
    return Planning(recipe, directory, source, data, text, evaluated, reading).plan()


@dataclass(frozen=True)
class Planning:
    """What a plan is made of. reading: seconds of imports and of reading the texts."""

    recipe: Recipe
    directory: RunDirectory
    source: SourceModel
    data: Datasets
    text: PlannedText | None
    evaluated: EvaluationData
    reading: float

    @cached_property
    def left(self) -> LeftToDo:
        return LeftToDo(self.recipe, self.source, self.data, self.directory, self.evaluated, self.text is not None)

    @cached_property
    def dtype(self) -> torch.dtype:
        config = self.source.folder.config
        return getattr(torch, self.recipe.dtype or config.get("dtype") or config.get("torch_dtype") or "float32")

    @cached_property
    def costs(self) -> LayerCosts:
        return LayerCosts.of(self.source.skeleton)

    @cached_property
    def trained(self) -> int:
        """The number of trained parameters."""
        if self.left.copies:
            return sum(self.costs.parameters[layer] for layer in self.left.layers)
        if self.recipe.method != "lora":
            return self.costs.total
        rank, layers = self.recipe.tune.lora_rank, decoder_layers(self.source.skeleton)
        return sum(rank * sum(parameter.shape) for parameter in layers.parameters() if parameter.ndim == 2)

    @cached_property
    def share(self) -> float:
        """The share of full training's time."""
        return self.costs.shares(self.left.layers)["time"] if self.left.copies else 1.0

    @property
    def size(self) -> int:
        """Bytes of the model with its copies."""
        return (self.costs.total + (self.trained if self.left.copies else 0)) * self.dtype.itemsize

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def plan(self) -> Plan:
        states, room = self.left.states, capacity(self.device)
        due = {name for name, state in states.items() if state in DUE}
        found: dict[str, StageEstimate] = {}
        steps, text = None, self.text
        weights = self.costs.total * self.dtype.itemsize
        fits = weights <= FULL * room
        if fits and due:
            found, steps, text = self._timed(due)
        counted = self._counted(text, steps)
        if steps is None and counted is not None and "tune" in due:
            found["tune"] = StageEstimate("tune", states["tune"], None, counted.total)
        stages = [StageEstimate("read", "to do", self.reading), *(found.get(name, StageEstimate(name, states[name])) for name in states)]
        peak = max((stage.peak or 0 for stage in stages), default=0)
        written = ("expand" in due) * self.size + ("tune" in due) * (self.size + 2 * self.trained * (self.dtype.itemsize + 8))
        free = _free(self.directory.folder)
        wrong = {
            f"the model's weights ({shown(weights)}) fill the memory ({shown(room)}): nothing is timed": not fits,
            f"{shown(peak)} of memory at most, of {shown(room)} there": fits and peak > FULL * room,
            f"{self.directory.folder}: {shown(written)} will be written, {shown(free)} are free": written > free,
        }
        full = None if steps is None or text is None else steps.of(text.plan.tokens) / self.share
        return Plan(
            model=self.source.name,
            parameters=self.costs.total,
            dtype=str(self.dtype).removeprefix("torch."),
            device=_named(self.device),
            sources=tuple({"for": use, "path": each.source.path, **each.counts()} for use, each in self.data.summaries()),
            held_out=self._held_out(),
            samples=() if self.text is None else tuple(samples(self.text, self.source, self.data)),
            training=None if text is None else text.plan,
            method=self.recipe.method,
            layers=tuple(self.left.layers),
            assumed=self.left.assumed,
            stages=tuple(stages),
            shares=self.costs.shares(self.left.layers) if self.left.copies else None,
            full_seconds=full,
            counted=counted,
            capacity=room,
            written=written,
            free=free,
            suggestions=self._suggested(text, counted, peak, room),
            warnings=tuple(line for line, holds in wrong.items() if holds),
        )

    @property
    def _batch(self) -> tuple[int, int]:
        """Rows of a forward, and forwards of a step."""
        args = arguments(tuning_settings(self.recipe), Path("unused"))
        return args.train_batch_size, args.gradient_accumulation_steps

    def _timed(self, due: set[str]) -> tuple[dict[str, StageEstimate], TimedSteps | None, PlannedText | None]:
        """Load the model, time pieces of what is due, and estimate each stage. Returns the text as this model takes it too."""
        recipe, source, data = self.recipe, self.source, self.data
        load = timed(source.load, 1, self.device)
        model = source.models.take(source.folder)
        given = self.evaluated
        corpora = [each.items for each in (given.general, given.domain, *given.also.values()) if each is not None]
        forward = time_forward(model, [item for items in corpora for item in items], estimates.SECONDS)
        machine, found = Machine(load, forward, time_writing(self.directory.folder)), {}
        if "score" in due:
            scoring = self.left.scoring
            work = ScoringWork(scoring.items, scoring.domain_items(), {scoring.loss, *scoring.losses}, recipe.score)
            found["score"] = estimates.scoring(model, work, machine)
        if "eval" in due:
            models = 2 + (self.left.copies and not PRESERVING[recipe.expand.initialisation])  # base and tuned, and expanded if it differs
            asked = [prompt.ids for prompt in given.prompts]
            answers = time_answers(model, source.tokenizer, asked[:BATCH], recipe.eval.answer_tokens) * math.ceil(len(asked) / BATCH)
            alphas = [] if recipe.eval.general_limit is None else [given.general.items]
            found["eval"] = estimates.evaluation(corpora, models, answers, alphas, machine)
        importance: Timed | None = None
        steering = data.items(data.steering())
        if self.left.copies and due & {"expand", "tune"}:
            model = expand_model(model, self.left.layers)
            freeze_original(model)
            importance = estimates.importances(model, steering)
        if "expand" in due and importance is not None:
            found["expand"] = estimates.expansion(importance, steering, self.size, machine)
        if "tune" not in due or self.text is None:
            return found, None, self.text
        text, isolation = estimates.isolation(model, self.text, machine)
        prepared = model if self.left.copies else prepare(model, recipe.method, recipe.tune.lora_rank, recipe.seed).model
        tuned = TuningWork(
            text=text,
            steps=max(0, text.plan.steps - self.left.done),
            begun=self.left.done > 0,
            copies=self.left.copies,
            trained=self.trained,
            size=self.dtype.itemsize,
            written=self.size,
            share=self.share,
            monitors=[*monitors(recipe, source, data).values()],
            steering=steering,
            metering=data.items(metered) if self.left.copies and (metered := data.metering()) else (),
            isolation=isolation,
        )
        found["tune"], steps = estimates.tuning(prepared, tuned, machine, importance)
        return found, steps, text

    def _counted(self, text: PlannedText | None, steps: TimedSteps | None) -> TrainingMemory | None:
        """Count the memory of a training step."""
        if text is None:
            return None
        if steps is not None:
            kept = steps.kept
        else:
            config, layers = text_config(self.source.skeleton), len(self.costs.parameters)
            above = layers - 1 - min(self.left.layers) if self.left.copies else 0
            kept = above * kept_by_layer(config, False, self.dtype)
            kept += (len(self.left.layers) if self.left.copies else layers) * kept_by_layer(config, True, self.dtype)
            kept += 0 if self.left.copies else 8 * config.vocab_size  # logits and their softmax in fp32
        tokens = self._batch[0] * text.plan.block_size
        return training_memory(self.size // self.dtype.itemsize, self.trained, self.dtype, kept * tokens)

    def _held_out(self) -> str | None:
        if self.text is None:
            return None
        count, given = len(self.data.held_out(None)), self.recipe.eval.domain
        if given is not None:
            return f"nothing: eval.domain has {count:,} documents"
        if self.data.streamed:
            return f"{HELD_OUT:.0%} of the domain's documents, those with the lowest hashes; {count:,} of them are measured on"
        few = f"; the report judges by {FEWEST_ITEMS} or more: give some as eval.domain" if count < FEWEST_ITEMS else ""
        return f"{count:,} documents of the domain, the {HELD_OUT:.0%} with the lowest hashes (one of fewer than 75){few}"

    def _suggested(self, text: PlannedText | None, counted: TrainingMemory | None, peak: int, room: int) -> tuple[Suggestion, ...]:
        if text is None or counted is None:
            return ()
        recipe, training = self.recipe, text.plan
        batch, accumulation = self._batch
        args = arguments(text.settings, Path("unused"), training.steps)
        documents = getattr(text.corpus, "documents", None)
        fixed = max(peak, counted.total) - counted.activations
        facts = Facts(
            method=recipe.method,
            layers=len(self.costs.parameters),
            width=text_config(self.source.skeleton).hidden_size,
            k=recipe.expand.k if self.left.copies and recipe.expand.layers is None and recipe.expand.budget is None else None,
            copies=self.left.copies,
            lengths=None if documents is None else np.diff(documents.starts),
            blocks=0.0 if training.epochs is None else training.steps * batch * accumulation / training.epochs,
            block_size=training.block_size,
            positions=text.positions,
            batch=batch,
            accumulation=accumulation,
            learning_rate=args.learning_rate,
            steps=training.steps,
            by_steps=args.max_steps > 0,
            epochs=training.epochs,
            refresh_steps=recipe.tune.refresh_steps,
            fixed=fixed,
            kept=counted.activations / (batch * training.block_size),
            capacity=room,
            checkpointing=bool(args.gradient_checkpointing),
        )
        return suggest(facts)


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads > 1)}"


def _free(folder: Path) -> int:
    """Return the free bytes on the disk that `folder` is or will be on."""
    return shutil.disk_usage(next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())).free
