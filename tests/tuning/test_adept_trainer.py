"""The Trainer with unit-wise rates: copies only, rates in effect, refreshes that touch nothing else, resume to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adept_fast import AdamW
from adept_fast.data.documents import Documents
from adept_fast.data.packing import Blocks
from adept_fast.errors import InputError, UnsupportedFamilyError
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.expansion.first_importance import first_importance
from adept_fast.scoring.unit_importance import Sums
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.monitor import Monitor
from adept_fast.tuning.trainer_log import TrainerLog
from tests.support import tiny_families, tiny_models


def blocks() -> Blocks:
    ids = np.random.default_rng(1).integers(3, tiny_models.VOCABULARY, 600).astype(np.int32)
    return Blocks(Documents(ids, np.array([0, 20, 90, 100, 250, 600])), np.arange(5), 24)


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **given)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder: Path, adept: dict | None = None, resume: str | None = None, stop: int = 0, dtype=torch.float32, dropout=0.0, **changes):
    model = expand_model(tiny_models.model("llama", dtype=dtype, attention_dropout=dropout), [0, 2])
    log = TrainerLog(folder / "log.jsonl")
    callback = AdeptCallback(tiny_models.items(3), **{"refresh_steps": 2, "log": log, **(adept or {})})
    trainer = AdeptTrainer(model, arguments(folder / "work", **changes), adept=callback, train_dataset=blocks())
    if stop:
        trainer.add_callback(Stop(stop))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
    entries = [json.loads(line) for line in log.path.read_text().splitlines()]
    return model, trainer, entries


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_only_copies_change_and_every_unit_has_its_rate(tmp_path: Path) -> None:
    model, trainer, entries = train(tmp_path)
    base = weights(expand_model(tiny_models.model(), [0, 2]))
    copies = tuple(f"model.layers.{layer}." for layer in model.adept_config.copies)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, base[name]) != name.startswith(copies), name
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, AdamW)
    refreshes = [entry for entry in entries if entry["event"] == "refresh"]
    assert [entry["step"] for entry in refreshes] == [0, 2, 4] and len(refreshes[0]["rates"]) == 18
    assert set(refreshes[0]["rates"].values()) == {0.5, 1.5} and min(refreshes[0]["importance"].values()) > 0
    assert refreshes[0]["importance"] != refreshes[-1]["importance"]
    for unit, rate in refreshes[-1]["rates"].items():
        multiplier, _ = optimizer.unit_lr(model.get_parameter(f"{unit}.weight"))
        assert float(multiplier) == pytest.approx(rate)
    steps = [entry for entry in entries if entry["event"] == "step"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6] and all(entry["loss"] > 0 for entry in steps)


@pytest.mark.slow
def test_first_importances_that_are_given_are_taken(tmp_path: Path) -> None:
    own = train(tmp_path / "own", max_steps=1)[2]
    sums = first_importance(expand_model(tiny_models.model(), [0, 2]), tiny_models.items(3))
    given = {key: Sums(2 * found.abs_taylor, found.fisher) for key, found in sums.items()}
    doubled = train(tmp_path / "given", {"first": given}, max_steps=1)[2]
    found, expected = (next(entry["importance"] for entry in entries if entry["event"] == "refresh") for entries in (doubled, own))
    assert found == {unit: pytest.approx(2 * value, rel=1e-5) for unit, value in expected.items()}


def test_a_log_is_cut_behind_a_step_and_holds_no_number_that_json_lacks(tmp_path: Path) -> None:
    log = TrainerLog(tmp_path / "log.jsonl")
    log.write("step", 1, loss=float("inf"), rates={"unit": float("nan"), "other": -float("inf")})
    log.write("step", 2, loss=0.5)
    log.write("end", 2)
    log.write("refresh", 3, rates={})
    with log.path.open("a") as file:
        file.write('{"event": "step", "st')
    log.cut(2)
    first, second = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert first == {"event": "step", "step": 1, "loss": None, "rates": {"unit": None, "other": None}}
    assert second == {"event": "step", "step": 2, "loss": 0.5}


def test_tokens_per_second_leave_out_what_callbacks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TrainerLog(tmp_path / "log.jsonl")
    monitor, args, control = Monitor(None, 100, log, tokens_per_step=64), arguments(tmp_path), TrainerControl()
    clock = iter([10.0, 13.0, 18.0, 20.0])  # training begins; a callback from 13 to 18; the log
    monkeypatch.setattr("adept_fast.tuning.monitor.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monitor._start_timer(4)
    monitor.on_step_end(args, TrainerState(global_step=7), control, torch.nn.Linear(1, 1))
    monkeypatch.setattr(monitor, "_start_timer", lambda step: None)
    monitor.on_log(args, TrainerState(global_step=9), control, {"loss": 1.0})
    assert json.loads(log.path.read_text())["tokens_per_second"] == 64 * 5 / (20 - 10 - (18 - 13))


@pytest.mark.slow
def test_a_zero_rate_freezes_its_unit(tmp_path: Path) -> None:
    def freeze_queries(values, units):
        return torch.tensor([0.0 if unit.kind == "q_proj" else 1.0 for unit in units])

    model, _, _ = train(tmp_path, {"rate_map": freeze_queries})
    before = weights(expand_model(tiny_models.model(), [0, 2]))
    for name, tensor in weights(model).items():
        if name.startswith("model.layers.1."):
            assert torch.equal(tensor, before[name]) == ("q_proj" in name), name


def ones(values, units):
    return torch.ones_like(values)


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 4, **CHECKPOINTED}])
def test_a_refresh_changes_nothing_but_the_rates(tmp_path: Path, changes: dict) -> None:
    """With a map of ones, a refresh at every step gives the weights of none, dropout's random numbers included."""
    often, _, entries = train(tmp_path / "a", {"rate_map": ones, "refresh_steps": 1}, dropout=0.1, **changes)
    never, _, _ = train(tmp_path / "b", {"rate_map": ones, "refresh_steps": 100}, dropout=0.1, **changes)
    assert [entry["step"] for entry in entries if entry["event"] == "refresh"] == [0, 1, 2, 3, 4, 5]
    assert same(weights(often), weights(never))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 4, **CHECKPOINTED}])
def test_the_callback_changes_nothing_but_the_rates_of_another_trainer(tmp_path: Path, changes: dict) -> None:
    found = []
    for callbacks in ([], [AdeptCallback(tiny_models.items(3), refresh_steps=1, rate_map=ones)]):
        model = expand_model(tiny_models.model(attention_dropout=0.1), [0, 2])
        freeze_original(model)
        args = arguments(tmp_path, **changes)
        made = Trainer(model, args, train_dataset=blocks(), callbacks=callbacks, optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2}))
        made.train()
        found.append(weights(model))
    assert same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, stop: int, dtype: torch.dtype) -> None:
    monitors = {"monitors": {"general": tiny_models.items(2, seed=9)}}
    whole, _, entries = train(tmp_path / "whole", monitors, dtype=dtype, dropout=0.1)
    train(tmp_path / "cut", monitors, stop=stop, dtype=dtype, dropout=0.1)
    checkpoint = tmp_path / "cut" / "work" / f"checkpoint-{stop - 1}"
    resumed, _, again = train(tmp_path / "cut", monitors, resume=str(checkpoint), dtype=dtype, dropout=0.1)
    assert same(weights(whole), weights(resumed))
    assert entries == again and [entry["event"] for entry in entries].count("evaluation") == 4


@pytest.mark.slow
def test_checkpoints_hold_what_changed_and_have_whole_names(tmp_path: Path) -> None:
    train(tmp_path, save_total_limit=1)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["checkpoint-6"]
    names = {path.name for path in (tmp_path / "work" / "checkpoint-6").iterdir()}
    assert {"adept_copies.safetensors", "adept_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names


@pytest.mark.slow
def test_a_checkpoint_too_many_goes_when_a_run_killed_before_its_rotation_is_resumed(tmp_path: Path) -> None:
    train(tmp_path, save_total_limit=2)
    work = tmp_path / "work"
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-2")
    train(tmp_path, resume=str(work / "checkpoint-6"), save_total_limit=2)
    assert {path.name for path in work.iterdir()} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.slow
def test_any_trainer_takes_the_callback(tmp_path: Path) -> None:
    model = expand_model(tiny_models.model(), [1])
    freeze_original(model)
    log = TrainerLog(tmp_path / "log.jsonl")
    callback = AdeptCallback(iter(tiny_models.items(2)), units="neuron", refresh_steps=3, log=log)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=blocks(), callbacks=[callback], optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2})
    )
    trainer.train()
    multipliers, dim = trainer.optimizer.optimizer.unit_lr(model.get_parameter("model.layers.2.mlp.down_proj.weight"))
    assert multipliers.shape == (48,) and dim == 1 and len(multipliers.unique()) > 10
    trainer.train()  # again, with the same callback


@pytest.mark.slow
def test_a_model_that_reads_ahead_is_refused(tmp_path: Path) -> None:
    causal = expand_model(tiny_families.model("roberta-prelayernorm", vocab_size=tiny_models.VOCABULARY), [1])
    causal.config.is_decoder = False
    model = type(causal)(causal.config)
    model.adept_config = causal.adept_config
    freeze_original(model)
    args, late, early = arguments(tmp_path), *(AdeptCallback(tiny_models.items(2)) for _ in range(2))
    made = Trainer(model, args, train_dataset=blocks(), optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2}))
    made.add_callback(late)
    for refused in (made.train, lambda: AdeptTrainer(model, args, adept=early, train_dataset=blocks())):
        with pytest.raises(UnsupportedFamilyError, match="reads ahead"):
            refused()


@pytest.mark.slow
def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    model = expand_model(tiny_models.model(), [1])
    freeze_original(model)
    callback = AdeptCallback(tiny_models.items(2))
    with pytest.raises(InputError, match=r"need adept_fast.AdamW, this Trainer has AdamW|optimizer_cls_and_kwargs"):
        Trainer(model, arguments(tmp_path), train_dataset=blocks(), callbacks=[callback]).train()
    with pytest.raises(InputError, match="optim=adafactor"):
        AdeptTrainer(model, arguments(tmp_path, optim="adafactor"), adept=callback, train_dataset=blocks()).train()
    with pytest.raises(InputError, match="expand it first"):
        AdeptTrainer(tiny_models.model(), arguments(tmp_path), adept=callback, train_dataset=blocks())
    with pytest.raises(InputError, match="refresh_steps"):
        AdeptCallback([], refresh_steps=0)
