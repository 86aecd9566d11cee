"""A run goes on from a checkpoint that was made alike, to more steps too; from another it is refused, with what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.tuning import checkpoint_digests
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.resume import RunRecord
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.trainer_log import TrainerLog
from tests.support import tiny_models
from tests.tuning.test_adept_trainer import Stop, arguments, blocks, same, weights

pytestmark = pytest.mark.slow

AVERAGED = {"rate_map": "mean_preserving"}


def made(
    folder: Path, adept: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, model: int = 0, **changes: Any
) -> AdeptTrainer:
    """Its model has random weights of the seed `model`."""
    expanded = expand_model(tiny_models.model("llama", seed=model, attention_dropout=0.1), [0, 2])
    given = {
        "refresh_steps": 2,
        "log": TrainerLog(folder / "log.jsonl"),
        "monitors": {"general": tiny_models.items(2, seed=9)},
        "monitor_steps": 3,
        "meter": Meter(tiny_models.items(2, seed=24), limit=1e-4, action="cut"),
        **(adept or {}),
    }
    callback = AdeptCallback(tiny_models.items(3), **given)
    constant = {"lr_scheduler_type": "constant", **changes}
    return AdeptTrainer(expanded, arguments(folder / "work", **constant), adept=callback, train_dataset=blocks(), **(trainer or {}))


def log(folder: Path, *events: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if not events or entry["event"] in events]


@pytest.mark.parametrize("short", [6, 5])
def test_a_run_that_had_ended_goes_on_to_more_steps_as_if_it_had_always_been_longer(tmp_path: Path, short: int) -> None:
    """Also where its last step was one of a refresh, which a run leaves out that ends there, or one past it, with a reading of its own."""
    straight = made(tmp_path / "straight", max_steps=10)
    straight.train()
    made(tmp_path / "two", max_steps=short).train()
    ended = log(tmp_path / "two", "end")
    again = made(tmp_path / "two", max_steps=10)
    again.train(resume_from_checkpoint=True)
    assert same(weights(straight.model), weights(again.model))
    for event in ("refresh", "step", "forgetting"):
        found = [entry for entry in log(tmp_path / "two", event) if event != "forgetting" or not entry["step"] % 2]
        assert found == log(tmp_path / "straight", event), event
    assert len(ended) == 1 and [entry["step"] for entry in log(tmp_path / "two", "end")] == [10]
    assert [entry["step"] for entry in log(tmp_path / "two", "evaluation")] == sorted({0, 3, short, 6, 9, 10})
    assert min(entry["meter_rate_scale"] for entry in log(tmp_path / "two", "forgetting")) < 1
    record = RunRecord.load(tmp_path / "two" / "work" / "checkpoint-10")
    assert record.steps == 10 and record.extended == [
        {"step": short, "steps": [short, 10], "learning_rate": [0.01, 0.01], "as_from_the_start": True}
    ]


def test_epochs_may_be_raised(tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "save_strategy": "epoch"}
    straight = made(tmp_path / "straight", **epochs, num_train_epochs=3)
    straight.train()
    made(tmp_path / "two", **epochs, num_train_epochs=1).train()
    again = made(tmp_path / "two", **epochs, num_train_epochs=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == straight.state.global_step == 3 * 13 and same(weights(straight.model), weights(again.model))


def test_settings_that_change_no_bit_do_not_bar_a_resume(tmp_path: Path) -> None:
    """Dropout, two epochs: evaluation, workers and reporting draw no number that training would have drawn."""
    straight = made(tmp_path / "straight", max_steps=16)
    straight.train()
    cut = made(tmp_path / "cut", max_steps=16)
    cut.add_callback(Stop(9))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    changed = {
        "logging_steps": 3, "save_steps": 5, "save_total_limit": 2, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "fork", "run_name": "other", "disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2,
        "eval_on_start": True, "per_device_eval_batch_size": 3, "activation_checkpointing": True, "log_level": "error",
        "torch_empty_cache_steps": 3, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    again = made(tmp_path / "cut", trainer={"eval_dataset": blocks()}, max_steps=16, **changed)
    again.train(resume_from_checkpoint=True)
    assert same(weights(straight.model), weights(again.model))
    assert log(tmp_path / "cut", "refresh") == log(tmp_path / "straight", "refresh")
    assert len([entry for entry in again.state.log_history if "eval_loss" in entry]) == 5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"per_device_train_batch_size": 3}, "the global batch: 2, now 3"),
        ({"learning_rate": 2e-2}, "learning_rate: 0.01, now 0.02"),
        ({"weight_decay": 0.2, "seed": 4}, "seed: 3, now 4, weight_decay: 0.1, now 0.2"),
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"adept": {"refresh_steps": 3}}, "refresh_steps: 2, now 3"),
        ({"adept": {"units": "head"}}, "the units"),
        ({"adept": AVERAGED}, "rate_map: 'rank', now 'mean_preserving'"),
        ({"adept": {"meter": Meter(tiny_models.items(2, seed=24), limit=2e-4, action="cut")}}, "the meter's limit"),
        ({"max_steps": 3}, "is past the run's 3 steps"),
        ({"model": 5}, "is of another model"),
    ],
)
def test_settings_that_change_a_run_are_refused_before_anything_is_touched(tmp_path: Path, changes: dict, named: str) -> None:
    made(tmp_path, max_steps=4).train()
    given = {"max_steps": 6, **changes}
    trainer = made(tmp_path, **given)
    before, said = weights(trainer.model), (tmp_path / "log.jsonl").read_text()
    with pytest.raises(InputError, match=named):
        trainer.train(resume_from_checkpoint=str(tmp_path / "work" / "checkpoint-4"))
    assert same(before, weights(trainer.model)) and (tmp_path / "log.jsonl").read_text() == said


def test_the_same_global_batch_in_other_pieces_goes_on(tmp_path: Path) -> None:
    made(tmp_path, max_steps=4).train()
    again = made(tmp_path, max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert again.train(resume_from_checkpoint=True).global_step == 6


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [({"lr_scheduler_type": "cosine"}, (0.0, 0.005)), ({"lr_scheduler_type": "linear", "warmup_steps": 0.25}, (0.0, 0.01 * 4 / 7))],
)
def test_another_schedule_is_said_and_accepted(tmp_path: Path, schedule: dict, rates: tuple[float, float]) -> None:
    made(tmp_path, max_steps=4, **schedule).train()
    given = {"max_steps": 8, **schedule}
    said = r"4 steps became 8, and (cosine|linear) would have given step [23] a learning rate of .*extend=True"
    with pytest.raises(InputError, match=said):
        made(tmp_path, **given).train(resume_from_checkpoint=True)
    again = made(tmp_path, trainer={"extend": True}, **given)
    again.train(resume_from_checkpoint=True)
    found = [entry["learning_rate"] for entry in log(tmp_path, "step")]
    assert found[4] == pytest.approx(rates[1]) and found[4] > found[5] > found[7] and len(found) == 8
    extended = RunRecord.load(tmp_path / "work" / "checkpoint-8").extended
    assert [(entry["step"], entry["steps"], entry["as_from_the_start"]) for entry in extended] == [(4, [4, 8], False)]
    assert extended[0]["learning_rate"] == [pytest.approx(rate) for rate in rates]
    assert made(tmp_path, **given).train(resume_from_checkpoint=True).global_step == 8  # accepted once and for all


@pytest.mark.nightly
def test_a_schedule_that_is_still_the_same_goes_on(tmp_path: Path) -> None:
    """WSD before its decay, also with a later one; a constant rate that begins to decay now; a warmup that is a share of the steps."""
    wsd = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.25}

    def decay(steps: int) -> dict[str, Any]:
        return {**wsd, "lr_scheduler_kwargs": {"num_decay_steps": steps, "decay_type": "1-sqrt"}}

    straight = made(tmp_path / "straight", max_steps=12, **{**decay(4), "warmup_steps": 2})
    straight.train()
    cut = made(tmp_path / "cut", max_steps=8, **decay(3))
    cut.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = made(tmp_path / "cut", max_steps=12, **decay(4))
    again.train(resume_from_checkpoint=True)
    assert same(weights(straight.model), weights(again.model))
    ended = made(tmp_path / "ended", max_steps=8, **decay(3))
    ended.train()
    with pytest.raises(InputError, match="warmup_stable_decay would have given step 7 .* a checkpoint of step 6 or before goes on"):
        made(tmp_path / "ended", max_steps=12, **decay(4)).train(resume_from_checkpoint=True)
    six = str(tmp_path / "ended" / "work" / "checkpoint-6")
    made(tmp_path / "ended", max_steps=12, **decay(4)).train(resume_from_checkpoint=six)


AGAIN = "delete checkpoint-2, and training starts again (save_total_limit=2 keeps one more)"
MISSING, CORRUPT = "{path}: missing: {again}", "{path}: corrupt: not the bytes that were written (digests.json): {again}"
DAMAGED: list[tuple[str, str | None, str, str]] = [
    (
        "adept_run.json", None, MISSING,
        "{path}: missing, so nothing says what checkpoint-2 was made with: delete the checkpoint to start again",
    ),
    (
        "adept_run.json", '{"steps": 3}', CORRUPT,
        "{path}: no record of a run (RunRecord.__init__() missing 3 required positional arguments: 'made_with', 'schedule', and "
        "'warmup_steps'): delete the checkpoint to start again",
    ),
    ("optimizer.pt", None, MISSING, "{folder}: holds no optimizer.pt (save_only_model?): a run cannot go on from it"),
    ("trainer_state.json", "{}", CORRUPT, "{path}: says no global_step: delete the checkpoint to start again"),
    (
        "trainer_state.json", None, "{path}: missing: delete checkpoint-2, or give the folder of a whole checkpoint",
        "{path}: missing: delete checkpoint-2, or give the folder of a whole checkpoint",
    ),
]  # fmt: skip
"""A file, what it becomes (None: gone), and what is said: while its digest is another, and under a digest that was taken anew."""


def sealed_again(folder: Path) -> None:
    (folder / checkpoint_digests.FILE).unlink()
    checkpoint_digests.write(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer, work = made(tmp_path, max_steps=2), tmp_path / "work"
    with pytest.raises(InputError, match=f"^{work}: holds no checkpoint to resume from: leave resume_from_checkpoint out to begin$"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match=f"^{work}/checkpoint-9: no such folder: give one named checkpoint-STEP$"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "work" / "checkpoint-9"))
    trainer.train(resume_from_checkpoint=False)
    folder = tmp_path / "work" / "checkpoint-2"
    for name, content, *messages in DAMAGED:
        whole = (folder / name).read_text() if name.endswith("json") else (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
        for said in messages:
            with pytest.raises(InputError) as refused:
                made(tmp_path, max_steps=4).train(resume_from_checkpoint=str(folder))
            assert str(refused.value) == said.format(path=folder / name, folder=folder, again=AGAIN)
            sealed_again(folder)
        (folder / name).write_text(whole) if isinstance(whole, str) else (folder / name).write_bytes(whole)
        sealed_again(folder)
    assert made(tmp_path, max_steps=4).train(resume_from_checkpoint=str(folder)).global_step == 4


def test_a_checkpoint_of_the_last_step_is_loaded_and_no_step_is_made(tmp_path: Path) -> None:
    ended = made(tmp_path, max_steps=4)
    ended.train()
    again = made(tmp_path, max_steps=4)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert same(weights(ended.model), weights(again.model))


def test_a_second_training_is_a_run_of_its_own_in_the_same_log(tmp_path: Path) -> None:
    trainer = made(tmp_path, {"meter": Meter(tiny_models.items(2, seed=11), limit=5.0)}, max_steps=3)
    trainer.train()
    trainer.train()
    entries = log(tmp_path)
    second = next(index for index, entry in enumerate(entries) if entry["event"] == "begin")
    assert entries[second] == {"event": "begin", "step": 0, "run": 2}
    steps = [[entry["step"] for entry in part if entry["event"] == "step"] for part in (entries[:second], entries[second:])]
    assert steps == [[1, 2, 3]] * 2
    readings = [[entry for entry in part if entry["event"] == "forgetting"] for part in (entries[:second], entries[second:])]
    assert [part[0]["meter_rise"] for part in readings] == [0, 0] and readings[0][-1]["meter_rise"] != 0
    assert readings[1][0]["meter_loss"] == pytest.approx(readings[0][-1]["meter_loss"], abs=1e-6)
    TrainerLog(tmp_path / "log.jsonl").cut(1)
    cut = log(tmp_path)
    assert cut[: second + 1] == entries[: second + 1] and {entry["step"] for entry in cut[second:]} == {0, 1}


def test_a_trainer_of_all_parameters_says_so_too(tmp_path: Path) -> None:
    def trainer(**changes: Any) -> StagedTrainer:
        return StagedTrainer(tiny_models.model(), arguments(tmp_path, lr_scheduler_type="constant", **changes), train_dataset=blocks())

    trainer(max_steps=2).train()
    with pytest.raises(InputError, match="adam_beta2: 0.999, now 0.98"):
        trainer(max_steps=4, adam_beta2=0.98).train(resume_from_checkpoint=True)
    assert trainer(max_steps=4).train(resume_from_checkpoint=True).global_step == 4


def test_a_stock_trainer_with_the_callback_refuses_other_settings_of_it(tmp_path: Path) -> None:
    from transformers import Trainer

    from adept_fast import AdamW

    def trainer(refresh_steps: int) -> Trainer:
        model = expand_model(tiny_models.model(), [0, 2])
        freeze_original(model)
        callback = AdeptCallback(tiny_models.items(3), refresh_steps=refresh_steps)
        args: TrainingArguments = arguments(tmp_path, max_steps=4)
        return Trainer(model, args, train_dataset=blocks(), callbacks=[callback], optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2}))

    trainer(2).train()
    with pytest.raises(InputError, match=r"was made with other settings \(refresh_steps\)"):
        trainer(3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
