"""The forgetting meter: predictions against fp64 truth, measured against predicted, limits, the same bits on resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from adept_fast import Units
from adept_fast.errors import InputError
from adept_fast.models.losses import corpus_loss
from adept_fast.report.forgetting_chart import forgetting
from adept_fast.report.page import write_report
from adept_fast.tuning.forgetting_meter import Meter, stopped_in
from adept_fast.tuning.training_history import TrainingHistory
from tests.support import tiny_models
from tests.tuning.test_adept_trainer import ones, same, train, weights
from tests.tuning.test_fast_step import expanded

ITEMS = tiny_models.items(4, seed=11)


def nudge(model: torch.nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("family, granularity", [("llama", "tensor"), ("phi3", "head"), ("mixtral", "neuron")])
def test_predictions_and_bounds_are_those_of_fp64_gradients(family: str, granularity: str) -> None:
    model = expanded(family)
    units, meter, exact = Units.of(model, granularity), Meter(ITEMS), copy.deepcopy(model).double().eval()
    exact.set_experts_implementation("eager")  # torch's grouped product takes no fp64
    first = meter.read(model, units)
    assert first.predicted is None and first.rise == 0 and model.training
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    nudge(model, 1e-3)
    reading = meter.read(model, units)
    tokens = sum(item.supervised for item in ITEMS)
    for item in ITEMS:
        logs = exact(torch.tensor([item.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(item.labels[1:])
        (-logs[labels != -100, labels[labels != -100]].sum() / tokens).backward()
    predicted, squares = torch.zeros(len(units), dtype=torch.float64), torch.zeros(2, len(units), dtype=torch.float64)
    for name, cut in units.slices.items():
        gradient = exact.get_parameter(name).grad
        change = model.get_parameter(name).detach().double() - before[name].double()
        if cut.unit.ndim == 2:
            gradient, change = (tensor.flatten(cut.dim, cut.dim + 1) for tensor in (gradient, change))
        for index, unit in enumerate(cut.unit.flatten().tolist()):
            g, d = gradient.select(cut.dim, index), change.select(cut.dim, index)
            predicted[unit] += (g * d).sum()
            squares[0, unit] += g.square().sum()
            squares[1, unit] += d.square().sum()
    bound = squares.prod(0).sqrt()
    assert (reading.predicted - predicted).norm() <= 1e-4 * predicted.norm()
    assert (reading.bound - bound).norm() <= 1e-4 * bound.norm()
    assert bool((reading.predicted.abs() <= reading.bound).all())
    assert abs(reading.loss - corpus_loss(model, ITEMS).mean) <= 1e-5 * reading.loss


def test_the_prediction_nears_the_measured_rise_as_the_change_shrinks() -> None:
    errors = []
    for size in (4e-3, 1e-3):
        model, meter = expanded().double(), Meter(ITEMS)
        units = Units.of(model, "tensor")
        meter.read(model, units)
        nudge(model, size)
        reading = meter.read(model, units)
        errors.append(abs(float(reading.predicted.sum()) - reading.rise) / abs(reading.rise))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05


def readings(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if entry["event"] == "forgetting"]


@pytest.mark.slow
def test_it_changes_no_weight_and_logs_every_unit(tmp_path: Path) -> None:
    plain, *_ = train(tmp_path / "plain", dropout=0.1, gradient_accumulation_steps=2)
    metered, _, entries = train(tmp_path / "metered", {"meter": Meter(ITEMS)}, dropout=0.1, gradient_accumulation_steps=2)
    assert same(weights(plain), weights(metered))
    found = readings(entries)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6] and "meter_predicted" not in found[0]
    rates = next(entry["rates"] for entry in entries if entry["event"] == "refresh")
    assert all(set(entry["meter_predicted"]) == set(rates) for entry in found[1:])
    for entry in found[1:]:
        assert all(abs(entry["meter_predicted"][name]) <= bound for name, bound in entry["meter_bound"].items())
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    figure = forgetting(TrainingHistory.load(tmp_path / "trainer_log.jsonl").readings)
    drawn = {line.get_label(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert drawn["measured"] == found[-1]["meter_rise"]
    assert drawn["predicted to first order"] == pytest.approx(sum(sum(entry["meter_predicted"].values()) for entry in found[1:]))
    assert 'aria-label="Forgetting, measured and predicted"' in write_report(tmp_path, {}, {}).read_text()


@pytest.mark.slow
def test_a_limit_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adept = {"meter": Meter(ITEMS, limit=1e-4), "monitors": {"general": ITEMS}, "monitor_steps": 100}
    _, trainer, entries = train(tmp_path, adept, learning_rate=0.3, max_steps=40, save_steps=100)
    stop = next(entry for entry in readings(entries) if entry["meter_rise"] > 1e-4)["step"]
    assert trainer.state.global_step == stop < 40 and entries[-1] == {"event": "end", "step": stop}
    assert stopped_in(tmp_path / "work" / f"checkpoint-{stop}") and not stopped_in(tmp_path)
    assert any("training stops" in line for line in caplog.messages)
    assert [entry["step"] for entry in entries if entry["event"] == "evaluation"] == [0, stop]
    assert max(entry["step"] for entry in entries if entry["event"] == "refresh") < stop


@pytest.mark.slow
def test_a_limit_cuts_all_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, _, entries = train(tmp_path, {"meter": Meter(ITEMS, 1e-4, "cut"), "rate_map": ones}, learning_rate=0.3)
    scale = 1.0
    for reading in readings(entries):
        scale *= 0.5 if reading["meter_rise"] > 1e-4 else 1.0
        assert reading["meter_rate_scale"] == scale
        rates = [entry["rates"] for entry in entries if entry["event"] == "refresh" and entry["step"] == reading["step"]]
        assert all(set(entry.values()) == {scale} for entry in rates)
    assert scale < 1 and sum("all rates are cut to 0.5 of what they would be" in line for line in caplog.messages) == 1


@pytest.mark.slow
def test_it_is_read_at_the_end_too(tmp_path: Path) -> None:
    adept = {"meter": Meter(ITEMS), "refresh_steps": 4, "monitors": {"general": ITEMS}, "monitor_steps": 5}
    _, _, entries = train(tmp_path, adept)
    steps = {event: [entry["step"] for entry in entries if entry["event"] == event] for event in ("forgetting", "refresh", "evaluation")}
    assert steps == {"forgetting": [0, 4, 6], "refresh": [0, 4], "evaluation": [0, 5, 6]}


def test_each_reading_above_the_limit_halves_the_rates_again() -> None:
    model, meter = expanded(), Meter(ITEMS, 1e-3, "cut")
    units, scales = Units.of(model, "tensor"), []
    for size, above in ((0, False), (0.3, True), (0, True), (-0.3, False)):
        nudge(model, size)
        assert (meter.read(model, units).rise > 1e-3) == above
        scales.append(meter.scale)
    assert scales == [1, 0.5, 0.25, 0.25] and not meter.stopped


@pytest.mark.slow
def test_a_second_training_measures_from_its_own_start(tmp_path: Path) -> None:
    meter = Meter(ITEMS, 1e-4, "cut")
    _, trainer, entries = train(tmp_path, {"meter": meter, "refresh_steps": 3}, learning_rate=0.3)
    last = readings(entries)[-1]
    assert last["meter_rise"] != 0 and meter.scale < 1
    trainer.train()
    log = (tmp_path / "log.jsonl").read_text().splitlines()[len(entries) :]
    first, *others = readings([json.loads(line) for line in log])
    assert (first["step"], first["meter_rise"], first["meter_rate_scale"]) == (0, 0, 1) and "meter_predicted" not in first
    assert first["meter_loss"] == pytest.approx(last["meter_loss"], rel=1e-6) and "meter_predicted" in others[0]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_reads_the_same(tmp_path: Path, stop: int) -> None:
    """Checkpoints every 2 steps, readings every 3: gradients and copies of the last reading come out of the checkpoint."""
    adept = {"refresh_steps": 3}
    whole, _, entries = train(tmp_path / "whole", {**adept, "meter": Meter(ITEMS, 1e-4, "cut")}, learning_rate=0.1)
    train(tmp_path / "cut", {**adept, "meter": Meter(ITEMS, 1e-4, "cut")}, stop=stop, learning_rate=0.1)
    checkpoint = str(tmp_path / "cut" / "work" / f"checkpoint-{stop - 1}")
    resumed, _, again = train(tmp_path / "cut", {**adept, "meter": Meter(ITEMS, 1e-4, "cut")}, resume=checkpoint, learning_rate=0.1)
    assert same(weights(whole), weights(resumed)) and entries == again
    assert "meter_predicted" in json.dumps(again)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="^action must be one of stop, cut"):
        Meter(ITEMS, 1.0, "halt")
    with pytest.raises(InputError, match="supervised"):
        Meter([])
