"""AdeptCallback: unit-wise learning rates in any transformers Trainer, refreshed while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.models import bare, require_causal, unwrapped, vocabulary_of
from adept_fast.optim import AdamW
from adept_fast.runtime.dtensor import in_shards
from adept_fast.scoring.unit_importance import Sums, UnitImportance, score_units, unit_importance
from adept_fast.scoring.units import Units
from adept_fast.settings.keys import Tuning
from adept_fast.settings.validation import check
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.kl_anchor import Anchor
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.param_group_rates import has_rate_groups, multiply_rates, refuse_flattened
from adept_fast.tuning.trainer_log import TrainerLog
from adept_fast.tuning.unit_rates import RateMap, RateRule, apply_rates

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments


class AdeptCallback(Monitor, ExportableState):
    """Sets one learning rate per unit at the start and every `refresh_steps` optimizer steps.

    probe: the steering corpus (records, items, a path or dataset name). units: a granularity or Units.
    rate_map: a map's name, a callable, or a RateRule with floor, moving average and conflict.
    first: sums of the copied layers (adept_fast.expansion.first_importance); without them a fresh model is probed at the start.
    anchor: adds a loss that holds the model to its base; its KL is logged.
    meter: read at the start, each refresh and the end; logged; it stops training or cuts all rates where its limit is passed.
    monitors, monitor_steps (None: each refresh), log, tokens_per_step, say, skip_nonfinite: see Monitor; refreshes are logged too.
    The Trainer's optimizer must be adept_fast.AdamW (AdeptTrainer makes one; elsewhere pass optimizer_cls_and_kwargs), or for units by
    tensor any other one made from `rate_groups`.
    A refresh reads the model in eval mode and leaves gradients, RNG and data order alone. A resumed run keeps the rates its
    optimizer was saved with. On several processes the probe and the items of meter and anchor are shared out (DDP),
    or run by all alike (FSDP2).
    """

    def __init__(
        self,
        probe: str | Source | Iterable[Mapping[str, Any] | Item],
        units: str | Units = Tuning.units,
        refresh_steps: int = Tuning.refresh_steps,
        rate_map: str | RateMap | RateRule = Tuning.rate_map,
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
        quiet: bool = False,
        skip_nonfinite: int = Tuning.skip_nonfinite,
    ) -> None:
        check(Tuning, "tune.", skip_nonfinite=skip_nonfinite)
        check(Tuning, "tune.", refresh_steps=refresh_steps, **({"units": units} if isinstance(units, str) else {}))
        super().__init__(monitors, monitor_steps or refresh_steps, log, tokens_per_step, say, quiet, skip_nonfinite, tokenizer)
        self.probe = list(probe) if isinstance(probe, Iterator) else probe  # a Trainer may train twice
        self.units, self.refresh_steps = units, refresh_steps
        self.rule = rate_map if isinstance(rate_map, RateRule) else RateRule(rate_map)
        self._spread_out: Tensor | None = None  # of the last refresh, for the moving average
        self.first, self.anchor, self.meter = first, anchor, meter
        self._anchored: Tensor | None = None
        self.resumed_from: str | None = None  # the checkpoint's folder, where it is not the Trainer's own
        self._items: list[Item] = []
        self._causal = False  # whether the model was found so

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        """Cuts the model into units before an engine wraps it; refuses one that reads ahead."""
        model = unwrapped(model)
        if not self._causal and not in_shards(model):
            require_causal(model)
            self._causal = True
        if isinstance(self.units, str):
            self.units = Units.of(model, self.units)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        refuse_flattened(model, optimizer)
        self.on_init_end(args, state, control, model)
        model = bare(model)
        self._open_log(state)
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        self._items = load_items(self.probe, tokenizer, vocabulary=vocabulary_of(model))
        inner = rated(optimizer)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("spread_out") if state.global_step else None
        self._spread_out = None if saved is None else torch.tensor(saved, dtype=torch.float64)
        if self.meter:
            self.meter.restart()
            if state.global_step:
                self.meter.load(Path(self.resumed_from or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"), model)
        if not state.global_step:
            self._read(model, 0, control)
            self._set(inner, model, self._first_importance(model), 0)
            self._monitor(model, 0)
        elif not isinstance(inner, AdamW):
            multiply_rates(inner)
        elif inner.unit_lr(model.get_parameter(next(iter(self.units.slices)))) is None:
            raise InputError("the checkpoint holds no unit rates (saved without its optimizer?): delete it to start again")
        self._start_timer(state.global_step)

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
            self._anchored = self.anchor.backward(bare(model), state.global_step, scale, share=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        model, step = bare(model), state.global_step
        with self._untimed():
            if step % self.refresh_steps == 0 or control.should_training_stop:  # by what came before: the last step, too
                self._read(model, step, control)
            if step % self.refresh_steps == 0 and not control.should_training_stop:
                inner = rated(optimizer)
                momenta = self._momenta(inner, model) if self.rule.conflict else None
                self._set(inner, model, score_units(model, self._items, self.units, None, self.quiet, True, momenta), step)
            self._monitor_where_due(model, state, control)

    def _of_step(self) -> dict[str, float]:
        anchored, self._anchored = self._anchored, None
        return {} if anchored is None else {"anchor_kl": float(anchored)}

    def _set(self, optimizer: Optimizer, model: PreTrainedModel, importance: UnitImportance, step: int) -> None:
        units = importance.units
        self._spread_out = self.rule.spread_out(importance, self._spread_out)
        rates = self.rule.rates(self._spread_out, importance) * (self.meter.scale if self.meter else 1.0)
        apply_rates(optimizer, model, units, rates)
        if self.log:
            conflict = {} if importance.conflict is None else {"conflict": _named(units, importance.conflict)}
            self.log.write("refresh", step, rates=_named(units, rates), importance=_named(units, importance.abs_taylor), **conflict)

    def _momenta(self, optimizer: Optimizer, model: PreTrainedModel) -> dict[str, Tensor]:
        states = {name: optimizer.state.get(model.get_parameter(name)) for name in self.units.slices}
        if any(state and "exp_avg" not in state for state in states.values()):
            raise InputError(f"tune.rate_conflict needs Adam's momentum (exp_avg), which {type(optimizer).__name__} does not keep")
        return {name: state["exp_avg"] for name, state in states.items() if state}

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


def _named(units: Units, values: Tensor) -> dict[str, float]:
    return {unit.name: float(value) for unit, value in zip(units, values, strict=True)}


def rated(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, out of accelerate's wrapper: one whose rates can be set."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not (isinstance(inner, AdamW) or has_rate_groups(inner)):
        raise InputError(
            f"unit-wise rates need adept_fast.AdamW, this Trainer has {type(inner).__name__}: use AdeptTrainer, or pass "
            "optimizer_cls_and_kwargs=(adept_fast.AdamW, {'lr': ...}) or optimizers=(adept_fast.AdamW(...), None); by tensor another one "
            "over adept_fast.tuning.rate_groups works too"
        )
    return inner
