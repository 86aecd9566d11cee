"""Estimate seconds and peak memory of each stage: what it does, counted, times what a piece of it took (timing.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SaveStrategy

from adept_fast.data.items import Item
from adept_fast.data.stream import Stream
from adept_fast.models.decoder_layers import device_of, evaluating
from adept_fast.models.losses import padded_tokens
from adept_fast.pipeline.planning.planned_stages import StageEstimate
from adept_fast.pipeline.planning.timing import Timed, TimedSteps, time_importance, time_masking, time_steps, timed, typical
from adept_fast.scoring.cheap_scores import cheap_scores
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.packs import pack
from adept_fast.scoring.settings import Score
from adept_fast.scoring.sweep import call_flops
from adept_fast.scoring.sweep import plan as sweep_plan
from adept_fast.scoring.unit_masking import forwards, masked_units
from adept_fast.tuning.collator import collator, isolates_documents
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.piece_losses import compared_pieces
from adept_fast.tuning.training_plan import PlannedText
from adept_fast.tuning.tuning_settings import arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 5.0  # of one timing, about
TRIED = 1 + 8 + 3  # strengths of the copies, at most: none, by eighths, then halved
PROOF = 2 * (2 * 33 + 2 * 4)  # tokens whose logits prove an expanded model, see expansion/verify.py


@dataclass(frozen=True)
class Machine:
    """Common speeds. load: of the model from disk; forward: in padded tokens; disk: in bytes."""

    load: Timed
    forward: Timed
    disk: Timed

    def losses(self, *corpora: Sequence[Item]) -> float:
        """Return the seconds of the losses of corpora."""
        return sum(self.forward.of(padded_tokens(items)) for items in corpora)


@dataclass(frozen=True)
class ScoringWork:
    """What is scored, and how. domain: items scored beside the probe. losses: that masking measures."""

    items: Sequence[Item]
    domain: Sequence[Item]
    losses: Collection[str]
    how: Score


@dataclass(frozen=True)
class TuningWork:
    """What is trained.

    steps: left to do; begun: from a checkpoint. trained: parameters; size: bytes of each. share: of full training's time. monitors: whose
    losses are read. steering, metering: items that set rates and meter forgetting, none without copies. isolation: see `isolation`.
    """

    text: PlannedText
    steps: int
    begun: bool
    copies: bool
    trained: int
    size: int
    written: int
    share: float
    monitors: Sequence[Sequence[Item]]
    steering: Sequence[Item] = ()
    metering: Sequence[Item] = ()
    isolation: Timed | None = None


def scoring(model: PreTrainedModel, work: ScoringWork, machine: Machine) -> StageEstimate:
    """Estimate scores.json, and scores by other methods and of units. A race is at most that."""
    how, parts, peak = work.how, {"loading": machine.load.seconds}, machine.forward.peak
    with evaluating(model):
        if how.method == "masking" or how.units:
            start = time.perf_counter()
            masks = LayerMasks(model, sweep_plan(model, [*work.items, *work.domain], how.sweep_tokens))
            parts["checks"] = time.perf_counter() - start
            losses = work.losses if how.method == "masking" else ("answer",)
            packs = pack(work.items, range(len(work.items)), masks.plan.pack, "all" in losses)
            beside = pack(work.domain, range(len(work.domain)), masks.plan.pack, True)
            masked = time_masking(masks, packs, losses, SECONDS)
            peak = max(peak, masked.peak)
            every = range(masks.count)
            if how.method == "masking":
                parts["masking"] = masked.of(sum(masks.flops(each, every) for each in [*packs, *beside]))
            if how.units:
                units = masked_units(model, how.units, how.unit_layers)
                calls = masks.count * forwards(units, masks.count)
                parts["units"] = masked.of(sum(call_flops(model, each, calls, 1 + len(units)) for each in packs))
        for method in dict.fromkeys((how.method, *how.compare)):
            if method != "masking":
                cheap = timed(partial(cheap_scores, model, [typical(work.items)], method, "answer"), 1, device_of(model))
                parts[method], peak = cheap.of(len(work.items) + len(work.domain)), max(peak, cheap.peak)
    return _estimate("score", "to do", peak, parts)


def expansion(importance: Timed, items: Sequence[Item], size: int, machine: Machine) -> StageEstimate:
    """Estimate expanded/. importance: of one item. size: bytes of the expanded model."""
    parts = {
        "first importances": importance.of(len(items)),
        "writing": machine.disk.of(size),
        "proof": machine.load.seconds + machine.forward.of(PROOF),
    }
    return _estimate("expand", "to do", max(importance.peak, machine.forward.peak), parts)


def importances(expanded: PreTrainedModel, items: Sequence[Item]) -> Timed:
    with evaluating(expanded):
        return time_importance(expanded, items)


def isolation(model: PreTrainedModel, text: PlannedText, machine: Machine) -> tuple[PlannedText, Timed | None]:
    """Plan one document a row for a model that attends across packed documents, by the check with which training begins.

    Returns the text and the timing of the check, None if it would take long.
    """
    if machine.forward.of(3 * text.plan.block_size) > 3 * SECONDS:
        return text, None
    blocks = text.blocks.head() if isinstance(text.blocks, Stream) else text.blocks
    found: list[bool] = []
    check = timed(lambda: found.append(isolates_documents(model, blocks, collator(model))), 1, device_of(model))
    return text if found[0] else text.one_per_row(), check


def tuning(model: Any, work: TuningWork, machine: Machine, importance: Timed | None) -> tuple[StageEstimate, TimedSteps]:
    """Estimate tuned/, and return the timing of its steps. model: prepared for training; it is changed."""
    text, settings = work.text, work.text.settings
    args = arguments(settings, Path("unused"), text.plan.steps)
    steps = _timed_steps(model, work, machine)
    parallel = args.train_batch_size * args.gradient_accumulation_steps
    parts = {"steps": work.steps * steps.of(parallel * text.plan.block_size)}
    ends = 1 if work.begun else 2
    losses = ends + _readings(work.steps, int(args.eval_steps or settings.refresh_steps))
    parts["held-out losses"] = losses * machine.losses(*work.monitors)
    if not work.begun:
        isolated = machine.forward.of(3 * text.plan.block_size) if work.isolation is None else work.isolation.seconds
        parts["checks of the text"] = machine.losses(*(compared_pieces(text.blocks) or ())) + isolated
    refreshes = _readings(work.steps, settings.refresh_steps)
    if importance is not None:
        read = refreshes * len(work.steering) + (ends + refreshes) * len(work.metering)
        parts["unit rates and meter"] = importance.of(read)
        if settings.anchor_weight is not None:
            parts["anchor"] = work.steps // settings.anchor_every * steps.of(settings.anchor_tokens)
    else:
        parts["comparison with the base"] = machine.load.seconds
    saved = work.trained * (work.size + 8)
    saves = 0 if args.save_strategy == SaveStrategy.NO else 1 + _readings(work.steps, int(args.save_steps or work.steps))
    parts["writing"] = machine.disk.of(saves * saved + work.written)
    meter = bool(work.metering) * work.trained * (work.size + 4)  # last copies and their gradient, see tuning/forgetting_meter.py
    peak = round(steps.peak + meter + steps.kept * (args.train_batch_size * text.plan.block_size - steps.work))
    peak = max(peak, 0 if work.isolation is None else work.isolation.peak)
    if not work.copies:  # the base is loaded too, beside weights and states
        peak = max(peak, round(peak - steps.kept * args.train_batch_size * text.plan.block_size + work.written))
    return _estimate("tune", "begun" if work.begun else "to do", peak, parts), steps


def _timed_steps(model: Any, work: TuningWork, machine: Machine) -> TimedSteps:
    """Time steps of the planned batch, or of as many of its rows and tokens as SECONDS allow."""
    text, blocks = work.text, work.text.blocks
    rows, tokens = arguments(text.settings, Path("unused")).train_batch_size, text.plan.block_size
    affordable = int(SECONDS / (machine.forward.of(1) * 3 * work.share))
    rows, tokens = max(1, min(rows, affordable // tokens)), max(min(64, tokens), min(tokens, affordable))
    first = blocks.head(2 * rows) if isinstance(blocks, Stream) else blocks
    with fast_step(model) if work.copies else nullcontext():
        return time_steps(model, text.settings, [first[index % len(first)] for index in range(2 * rows)], rows, tokens)


def _readings(steps: int, every: int) -> int:
    """Return how often every so many steps come before the last."""
    return max(0, math.ceil(steps / every) - 1)


def evaluation(
    corpora: Sequence[Sequence[Item]], models: int, answers: float, alphas: Sequence[Sequence[Item]], machine: Machine
) -> StageEstimate:
    """Estimate eval.json.

    models: evaluated on the corpora. answers: seconds of those of one model. alphas: corpora on which the largest alpha is sought.
    """
    parts = {"loading": models * machine.load.seconds, "losses": models * machine.losses(*corpora), "answers": models * answers}
    if alphas:
        parts["largest alpha"] = machine.load.seconds + TRIED * machine.losses(*alphas)
    return _estimate("eval", "to do", machine.forward.peak, parts)


def _estimate(name: str, state: str, peak: int, parts: Mapping[str, float]) -> StageEstimate:
    return StageEstimate(name, state, sum(parts.values()), peak, dict(parts))
