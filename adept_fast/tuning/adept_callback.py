"""AdeptCallback sets unit-wise learning rates in any transformers Trainer, and refreshes them while it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.models.causality import require_causal
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.models.unwrap import bare, unwrapped
from adept_fast.ops.gradient_sums.op import Dims
from adept_fast.optim import AdamW
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.provenance import changed, digest
from adept_fast.scoring.unit_importance import Sums, UnitImportance, score_units, unit_importance
from adept_fast.scoring.units import Units
from adept_fast.settings.validation import COUNT, check, prefixed, require, require_made, require_table
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.kl_anchor import Anchor
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.param_group_rates import has_rate_groups, multiply_rates, refuse_flattened
from adept_fast.tuning.resume import RestoresItself, items_digest
from adept_fast.tuning.settings import Tuning
from adept_fast.tuning.trainer_log import TrainerLog
from adept_fast.tuning.unit_rates import RateMap, RateRule, apply_rates, summary

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class AdeptCallback(Monitor, RestoresItself):
    """Set one learning rate per unit at the start of training, and again every `refresh_steps` optimizer steps.

    The Trainer's optimizer must be adept_fast.AdamW, or for units by tensor any optimizer over `rate_groups`. A refresh runs the model in
    eval mode and leaves gradients, random state and data order alone. A resumed run restores the rates with its optimizer. Processes under
    DDP share the items of probe, meter and anchor; under FSDP2 each runs all of them.

    Args:
        probe: the corpus that sets the rates: items, records, a path or a dataset name (see `load_items`).
        units: "tensor", "head", "neuron", or Units.
        refresh_steps: optimizer steps between two refreshes.
        rate_map: the name of a map, a callable, or a RateRule with floor, moving average and conflict.
        first: sums of the copied layers from `adept_fast.expansion.first_importance.first_importance`; None measures them at the start.
        monitors, monitor_steps, log, tokens_per_step, skip_nonfinite: see Monitor; `monitor_steps` None means at each refresh.
        anchor: an Anchor, whose KL is logged.
        meter: a forgetting Meter, read at the start, at each refresh and at the end.
        tokenizer: needed for a probe of texts or records, where the Trainer has no processing_class.
        train_original: accept a model in which more than the copies would train.

    Raises:
        InputError: a wrong argument; when training begins: another optimizer, a model that is not causal, or a checkpoint of other
            settings.

    Source: ADEPT (arXiv 2510.10071), stage 2.

    >>> from transformers import Trainer, TrainingArguments
    >>> expanded = expand_model(model, [1])
    >>> counts = freeze_original(expanded)
    >>> args = TrainingArguments("out", per_device_train_batch_size=1, max_steps=2, report_to="none")
    >>> data = [{"input_ids": item.input_ids, "labels": item.input_ids} for item in probe]
    >>> given = {"callbacks": [AdeptCallback(probe)], "optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-4})}
    >>> Trainer(expanded, args, train_dataset=data, **given).train().global_step
    {'train_runtime': ...}
    2
    """

    def __init__(
        self,
        probe: str | Source | Iterable[Mapping[str, Any] | Item],
        units: str | Units = Tuning.units,
        refresh_steps: int = Tuning.refresh_steps,
        rate_map: str | RateMap | RateRule = Tuning.rate_map,
        *,
        first: Mapping[tuple[str, Dims], Sums] | None = None,
        monitors: Mapping[str, Sequence[Item]] | None = None,
        monitor_steps: int | None = None,
        anchor: Anchor | None = None,
        meter: Meter | None = None,
        log: TrainerLog | None = None,
        tokens_per_step: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        skip_nonfinite: int = Tuning.skip_nonfinite,
        train_original: bool = False,
    ) -> None:
        named: dict[str, Any] = {"units": units} if isinstance(units, str) else {}
        check(Tuning, refresh_steps=refresh_steps, skip_nonfinite=skip_nonfinite, **named)
        for name, count in {"monitor_steps": monitor_steps, "tokens_per_step": tokens_per_step}.items():
            if count is not None:
                require(name, count, int, COUNT)
        for name, value, kind in (("anchor", anchor, Anchor), ("meter", meter, Meter), ("log", log, TrainerLog)):
            if value is not None:
                require_made(name, value, kind, f"give {kind.__name__}(...), or leave it out")
        require_table("first", first)
        super().__init__(monitors, monitor_steps or refresh_steps, log, tokens_per_step, skip_nonfinite, tokenizer)
        self.probe = list(probe) if isinstance(probe, Iterator) else probe  # a Trainer may train twice
        self._units, self.refresh_steps = units, refresh_steps
        with prefixed("rate_"):
            self.rule = rate_map if isinstance(rate_map, RateRule) else RateRule(rate_map)
        self._raw_rates: Tensor | None = None  # of the last refresh, for the moving average
        self.first, self.anchor, self.meter = first, anchor, meter
        self._anchored: Tensor | None = None  # KL of this step, for the log
        self.resumed_from: str | None = None  # the checkpoint's folder, where it is not the Trainer's own
        self.train_original = train_original
        self.restored_by_trainer = False  # set by a Trainer that leaves the restoring to this callback
        self._items: list[Item] = []
        self._made_with: dict[str, Any] | None = None
        self._refreshed: int | None = None  # the step of the last refresh

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        """Cut the model into units before an engine wraps it, and refuse a model that is not causal."""
        model = unwrapped(model)
        if not in_shards(model):
            require_causal(model)
        if isinstance(self._units, str):
            self._units = Units.of(model, self._units)
        require_made("units", self._units, Units, "a granularity, or Units.of(model)")

    @property
    def units(self) -> Units:
        """The units of the Trainer's model."""
        assert isinstance(self._units, Units)
        return self._units

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        refuse_flattened(model, optimizer)
        self.on_init_end(args, state, control, model)
        model = bare(model)
        self._refuse_other_training(model, args)
        made_with = self.made_with(model, self.tokenizer or kwargs.get("processing_class"))
        kept: Any = state.stateful_callbacks  # transformers declares a list, and holds a table
        saved = kept.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        if differing := changed(saved.get("made_with", made_with), made_with):
            raise InputError(f"the checkpoint was made with other settings ({', '.join(differing)}): go on with those, or begin anew")
        self._made_with = made_with
        self._open_log(state)
        inner = rated_optimizer(optimizer)
        raw_rates = saved.get("raw_rates")
        self._raw_rates = None if raw_rates is None else torch.tensor(raw_rates, dtype=torch.float64)
        self._refreshed = saved.get("refreshed", state.global_step)
        if self.meter:
            self.meter.reset()
            if state.global_step:
                self.meter.load(Path(self.resumed_from or _checkpoint(args, state)), model)
        if not state.global_step:
            self._read(model, 0, control)
            self._set(inner, model, self._first_importance(model), 0)
            self._monitor(model, 0)
        elif not isinstance(inner, AdamW):
            multiply_rates(inner)
        elif inner.unit_lr(model.get_parameter(next(iter(self.units.slices)))) is None:
            raise InputError("the checkpoint holds no unit rates (saved without its optimizer?): delete it to start again")
        elif self._refreshed != state.global_step and state.global_step % self.refresh_steps == 0:
            self._refresh(inner, model, state.global_step)  # the run had ended at a refresh, which its last step left out
        self._start_timer(state.global_step)

    def made_with(self, model: PreTrainedModel, tokenizer: Any = None) -> dict[str, Any]:
        """Return the settings with which a resumed run must agree: name -> value. Reads the probe."""
        self._items = self._items or load_items(self.probe, tokenizer, vocabulary=vocabulary_of(model))
        units = Units.of(model, self._units) if isinstance(self._units, str) else self.units
        rule, anchor, meter = self.rule, self.anchor, self.meter
        named = rule.map if isinstance(rule.map, str) else getattr(rule.map, "__qualname__", type(rule.map).__name__)
        return {
            "the units": digest([(unit.name, unit.kind) for unit in units]),
            "refresh_steps": self.refresh_steps,
            "the probe": items_digest(self._items),
            **{"rate_map": named, "rate_floor": rule.floor, "rate_average": rule.average, "rate_conflict": rule.conflict},
            "the anchor": None if anchor is None else [anchor.weight, anchor.every, [items_digest(group) for group in anchor.groups]],
            "the meter's limit": None if meter is None or meter.limit is None else [meter.limit, meter.action, items_digest(meter.items)],
        }

    def _refuse_other_training(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Raise InputError where more than the copies would train, or where transformers would construct this callback anew."""
        others = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in self.units.slices]
        if others and not self.train_original:
            raise InputError(
                f"{len(others):,} parameters outside the copies would train too, first {others[0]}: call adept_fast.freeze_original(model) "
                "before the Trainer is made; AdeptCallback(..., train_original=True) lets them train"
            )
        if args.restore_callback_states_from_checkpoint and not self.restored_by_trainer:
            raise InputError(
                "restore_callback_states_from_checkpoint: this Trainer would make AdeptCallback anew, without its probe: leave it out (the "
                "callback restores itself), or use AdeptTrainer"
            )

    def _first_importance(self, model: PreTrainedModel) -> UnitImportance:
        from adept_fast.expansion.first_importance import first_importance

        sums = self.first if self.first is not None else first_importance(model, self._items, share=True)
        return unit_importance(self.units, sums)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the anchor's gradient. Gradients are still None here, so clipping, scaling and all-reduce include the anchor's."""
        if self.anchor and self.anchor.due(state.global_step):
            scaler = getattr(optimizer, "scaler", None)
            scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=args.device))
            self._anchored = self.anchor.backward(bare(model), state.global_step, scale, share=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        model, step = bare(model), state.global_step
        with self._untimed():
            due = step % self.refresh_steps == 0
            if due or control.should_training_stop:  # the last step is measured too
                aside = None if due else self.meter
                before = aside and aside.snapshot()
                self._read(model, step, control)
                if aside and before:
                    aside.restore(before)  # a longer run would not have measured here
            if due and not control.should_training_stop:
                self._refresh(rated_optimizer(optimizer), model, step)
            self._monitor_where_due(model, state, control)

    def _refresh(self, optimizer: Optimizer, model: PreTrainedModel, step: int) -> None:
        momenta = self._momenta(optimizer, model) if self.rule.conflict else None
        self._set(optimizer, model, score_units(model, self._items, self.units, None, True, momenta), step)

    def _step_extras(self) -> dict[str, float]:
        anchored, self._anchored = self._anchored, None
        return {} if anchored is None else {"anchor_kl": float(anchored)}

    def _set(self, optimizer: Optimizer, model: PreTrainedModel, importance: UnitImportance, step: int) -> None:
        units = importance.units
        self._raw_rates, self._refreshed = self.rule.raw_rates(importance, self._raw_rates), step
        rates = self.rule.rates(self._raw_rates, importance) * (self.meter.scale if self.meter else 1.0)
        apply_rates(optimizer, model, units, rates)
        self.track(summary(units, rates))
        if self.log:
            conflict = {} if importance.conflict is None else {"conflict": _named(units, importance.conflict)}
            self.log.write("refresh", step, rates=_named(units, rates), importance=_named(units, importance.abs_taylor), **conflict)

    def _momenta(self, optimizer: Optimizer, model: PreTrainedModel) -> dict[str, Tensor]:
        states = {name: optimizer.state.get(model.get_parameter(name)) for name in self.units.slices}
        if any(state and "exp_avg" not in state for state in states.values()):
            raise InputError(f"conflict needs Adam's momentum (exp_avg), which {type(optimizer).__name__} does not keep")
        return {name: state["exp_avg"] for name, state in states.items() if state}

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json stores for a resumed run: the moving average, the last refresh, the settings."""
        average = None if self._raw_rates is None or not self.rule.average else self._raw_rates.tolist()
        made_with = {} if self._made_with is None else {"made_with": self._made_with}
        return {"args": {}, "attributes": {"raw_rates": average, "refreshed": self._refreshed, **made_with}}

    def _read(self, model: PreTrainedModel, step: int, control: TrainerControl) -> None:
        if not self.meter:
            return
        scale, reading = self.meter.scale, self.meter.read(model, self.units)
        content: dict[str, Any] = {"loss": reading.loss, "rise": reading.rise, "rate_scale": self.meter.scale}
        self.track({f"meter_{key}": value for key, value in content.items()})
        if self.log:
            for name in ("predicted", "bound"):
                if (values := getattr(reading, name)) is not None:
                    content[name] = _named(self.units, values)
            self.log.write("forgetting", step, **{f"meter_{key}": value for key, value in content.items()})
        if self.meter.stopped:
            control.should_training_stop = control.should_save = True
        if self.meter.stopped or self.meter.scale < scale:
            action = "training stops" if self.meter.stopped else f"all rates are cut to {self.meter.scale:g} of what they would be"
            logger.warning(f"step {step}: general loss rose by {reading.rise:.3f} nats per token, above {self.meter.limit:g}: {action}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if self.meter and folder.is_dir():
            self.meter.save(folder, bare(model))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _named(units: Units, values: Tensor) -> dict[str, float]:
    return {unit.name: float(value) for unit, value in zip(units, values, strict=True)}


def rated_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper. Raises InputError for one that cannot have unit-wise rates."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not (isinstance(inner, AdamW) or has_rate_groups(inner)):
        raise InputError(
            f"unit-wise rates need adept_fast.AdamW, this Trainer has {type(inner).__name__}: use AdeptTrainer, or pass "
            "optimizer_cls_and_kwargs=(adept_fast.AdamW, {'lr': ...}) or optimizers=(adept_fast.AdamW(...), None); by tensor another one "
            "over adept_fast.tuning.param_group_rates.rate_groups works too"
        )
    return inner
