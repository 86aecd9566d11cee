"""AdeptCallback: unit-wise learning rates in any transformers Trainer, refreshed while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adept_fast import distributed
from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.losses import corpus_loss
from adept_fast.optim import AdamW
from adept_fast.optim.shards import is_sharded
from adept_fast.saliency import Sums, UnitImportance, bare, score_units, unit_importance
from adept_fast.tuning.anchor import Anchor
from adept_fast.tuning.groups import refuse_flattened
from adept_fast.tuning.log import TrainerLog
from adept_fast.tuning.memory import peak_memory
from adept_fast.tuning.meter import Meter
from adept_fast.tuning.rates import RateMap, RateRule, apply_rates
from adept_fast.units import Units

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments


class AdeptCallback(TrainerCallback, ExportableState):
    """Sets one learning rate per unit at the start and every `refresh_steps` optimizer steps.

    probe: the steering corpus (records, items, a path or dataset name). units: a granularity or Units.
    rate_map: a map's name, a callable, or a RateRule with floor, moving average and conflict.
    first: sums of the copied layers (adept_fast.expansion.first_importance); without them a fresh model is probed at the start.
    monitors: name -> items whose mean loss is logged at the start, every `monitor_steps` (each refresh) and at the end; they steer nothing.
    anchor: adds a loss that holds the model to its base; its KL is logged.
    meter: read at the start, each refresh and the end; logged; it stops training or cuts all rates where its limit is passed.
    log: where refreshes, losses and steps are written as JSON lines; say: where the monitored losses are told, one line each time.
    tokens_per_step: for tokens/s, refreshes left out, and peak memory in bytes in the log.
    The Trainer's optimizer must be adept_fast.AdamW (AdeptTrainer makes one; elsewhere pass optimizer_cls_and_kwargs).
    A refresh reads the model in eval mode and leaves gradients, RNG and data order alone. A resumed run keeps the rates its
    optimizer was saved with. On several processes the probe is shared out (DDP), or run by all alike (FSDP2); rank 0 writes and tells.
    """

    def __init__(
        self,
        probe: str | Source | Iterable[Mapping[str, Any] | Item],
        units: str | Units = "tensor",
        refresh_steps: int = 500,
        rate_map: str | RateMap | RateRule = "rank",
        *,
        first: Mapping[tuple[str, int], Sums] | None = None,
        monitors: Mapping[str, Sequence[Item]] | None = None,
        monitor_steps: int | None = None,
        anchor: Anchor | None = None,
        meter: Meter | None = None,
        log: TrainerLog | None = None,
        tokens_per_step: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        say: Callable[[str], None] | None = None,
        quiet: bool | None = None,
    ) -> None:
        if refresh_steps < 1:
            raise InputError(f"tune.refresh_steps must be 1 or more, found {refresh_steps}")
        self.probe, self.units, self.refresh_steps = probe, units, refresh_steps
        self.rule = rate_map if isinstance(rate_map, RateRule) else RateRule(rate_map)
        self._spread_out: Tensor | None = None  # of the last refresh, for the moving average
        self.monitor_steps = monitor_steps or refresh_steps
        self.first, self.monitors, self.log, self.tokens_per_step = first, dict(monitors or {}), log, tokens_per_step
        self.anchor, self.meter = anchor, meter
        self._anchored: Tensor | None = None
        self.tokenizer, self.say, self.quiet = tokenizer, say, quiet
        self.resumed_from: str | None = None  # the checkpoint's folder, where it is not the Trainer's own
        self._items: list[Item] = []
        self._timed: tuple[float, int] = (0.0, 0)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        """Cuts the model into units before an engine wraps it."""
        if isinstance(self.units, str):
            self.units = Units.of(bare(model), self.units)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        refuse_flattened(model, optimizer)
        self.on_init_end(args, state, control, model)
        model = bare(model)
        if not state.is_world_process_zero:
            self.log = self.say = None
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        self._items = load_items(self.probe, tokenizer)
        inner = adamw(optimizer)
        if self.log and state.global_step:
            self.log.cut(state.global_step)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("spread_out") if state.global_step else None
        self._spread_out = None if saved is None else torch.tensor(saved, dtype=torch.float64)
        if self.meter and state.global_step:
            self.meter.load(Path(self.resumed_from or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"), model)
        if not state.global_step:
            self._read(model, 0, control)
            self._set(inner, model, self._first_importance(model), 0)
            self._monitor(model, 0)
        elif inner.unit_lr(model.get_parameter(next(iter(self.units.slices)))) is None:
            raise InputError("the checkpoint holds no unit rates (saved without its optimizer?): delete it to start again")
        self._start_timer(state.global_step)

    def _start_timer(self, step: int) -> None:
        self._timed = (time.perf_counter(), step)

    def _first_importance(self, model: PreTrainedModel) -> UnitImportance:
        from adept_fast.expansion import first_importance

        sums = self.first if self.first is not None else first_importance(model, self._items, self.quiet, share=True)
        return unit_importance(self.units, sums)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Before the step's first batch: gradients are none yet, and what clips, scales or reduces them takes the anchor's along."""
        if self.anchor and self.anchor.due(state.global_step):
            scaler = getattr(optimizer, "scaler", None)
            scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=args.device))
            self._anchored = self.anchor.backward(bare(model), state.global_step, scale)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        start = time.perf_counter()
        model, step, last = bare(model), state.global_step, state.global_step >= state.max_steps
        if step % self.refresh_steps == 0 or last:
            self._read(model, step, control)
        if step % self.refresh_steps == 0 and not (last or control.should_training_stop):
            inner = adamw(optimizer)
            momenta = self._momenta(inner, model) if self.rule.conflict else None
            self._set(inner, model, score_units(model, self._items, self.units, None, self.quiet, True, momenta), step)
        if step % self.monitor_steps == 0 or last or control.should_training_stop:
            self._monitor(model, step)
        self._timed = (self._timed[0] + time.perf_counter() - start, self._timed[1])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.log and logs and "loss" in logs:
            content = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "epoch") if key in logs}
            now, steps = time.perf_counter(), state.global_step - self._timed[1]
            if self.tokens_per_step and steps:
                content["tokens_per_second"] = self.tokens_per_step * steps / (now - self._timed[0])
                content["peak_memory"] = peak_memory(args.device)
            if self._anchored is not None:
                content["anchor_kl"] = float(self._anchored)
            self.log.write("step", state.global_step, **content)
        self._anchored = None
        self._timed = (time.perf_counter(), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.log:
            self.log.write("end", state.global_step)

    def _set(self, optimizer: AdamW, model: PreTrainedModel, importance: UnitImportance, step: int) -> None:
        units = importance.units
        self._spread_out = self.rule.spread_out(importance, self._spread_out)
        rates = self.rule.rates(self._spread_out, importance) * (self.meter.scale if self.meter else 1.0)
        apply_rates(optimizer, model, units, rates)
        if self.log:
            conflict = {} if importance.conflict is None else {"conflict": _named(units, importance.conflict)}
            self.log.write("refresh", step, rates=_named(units, rates), importance=_named(units, importance.abs_taylor), **conflict)

    def _momenta(self, optimizer: AdamW, model: PreTrainedModel) -> dict[str, Tensor]:
        parameters = {name: model.get_parameter(name) for name in self.units.slices}
        return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in parameters.items() if optimizer.state.get(parameter)}

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps in trainer_state.json: the moving average, which a resumed run goes on from."""
        kept = None if self._spread_out is None or not self.rule.average else self._spread_out.tolist()
        return {"args": {}, "attributes": {"spread_out": kept}}

    def _read(self, model: PreTrainedModel, step: int, control: TrainerControl) -> None:
        if not self.meter:
            return
        scale, reading = self.meter.scale, self.meter.read(model, self.units, self.quiet)
        if self.log:
            content = {"loss": reading.loss, "rise": reading.rise, "rate_scale": self.meter.scale}
            for name in ("predicted", "bound"):
                if (values := getattr(reading, name)) is not None:
                    content[name] = _named(self.units, values)
            self.log.write("forgetting", step, **{f"meter_{key}": value for key, value in content.items()})
        if self.meter.stopped:
            control.should_training_stop = control.should_save = True
        if self.say and (self.meter.stopped or self.meter.scale < scale):
            action = "training stops" if self.meter.stopped else f"all rates are cut to {self.meter.scale:g} of what they would be"
            self.say(f"step {step}: general loss rose by {reading.rise:.3f} nats per token, above {self.meter.limit:g}: {action}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.meter and folder.is_dir():
            self.meter.save(folder, bare(model))

    def _monitor(self, model: PreTrainedModel, step: int) -> None:
        if not self.monitors:
            return
        losses = {name: _mean_loss(model, items, name, self.quiet) for name, items in self.monitors.items()}
        if self.log:
            self.log.write("evaluation", step, **{f"{name}_loss": loss for name, loss in losses.items()})
        if self.say:
            self.say(f"step {step}: " + ", ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items()))


def _mean_loss(model: PreTrainedModel, items: Sequence[Item], title: str, quiet: bool | None) -> float:
    """Mean loss of items, shared out over processes that hold the whole model."""
    if any(map(is_sharded, model.parameters())):
        return corpus_loss(model, items, title=title, quiet=quiet).mean
    found = corpus_loss(model, distributed.share(items), title=title, quiet=quiet)
    loss, tokens = distributed.total(torch.stack([found.sums.sum(), found.tokens.sum().double()]))
    return float(loss / tokens)


def _named(units: Units, values: Tensor) -> dict[str, float]:
    return {unit.name: float(value) for unit, value in zip(units, values, strict=True)}


def adamw(optimizer: Optimizer) -> AdamW:
    """The optimizer itself, out of accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, AdamW):
        raise InputError(
            f"unit-wise rates need adept_fast.AdamW, this Trainer has {type(inner).__name__}: use AdeptTrainer, or pass "
            "optimizer_cls_and_kwargs=(adept_fast.AdamW, {'lr': ...}) or optimizers=(adept_fast.AdamW(...), None)"
        )
    return inner
