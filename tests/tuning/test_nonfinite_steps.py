"""A loss or gradient that is no number stops the run with step and documents, or is skipped, counted, and touches nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from adept_fast import AdamW
from adept_fast.checkpoints import checkpoint
from adept_fast.data.documents import Documents, WeightedDocuments
from adept_fast.errors import InputError
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.nonfinite_steps import NonFiniteSteps
from adept_fast.tuning.staged_trainer import StagedTrainer
from adept_fast.tuning.trainer_log import TrainerLog
from adept_fast.tuning.training_plan import plan
from adept_fast.tuning.training_run import RunFiles
from adept_fast.tuning.tune_checkpoint import tune_checkpoint
from adept_fast.tuning.tuning_settings import TuningSettings
from tests.support import tiny_models

BAD = 299  # a token that makes a document's hidden states NaN
STEPS = 6


def poisoned(value: float = math.nan):
    model = tiny_models.model()

    def spoil(module, args, output):
        return output.masked_fill((args[0] == BAD)[..., None], value)

    expanded = expand_model(model, [1, 2])
    expanded.get_input_embeddings().register_forward_hook(spoil)
    return expanded


def rows(bad: tuple[int, ...]) -> list[dict[str, list[int]]]:
    """Two rows a step; the second of each step in `bad` (the first is 1) holds the token."""
    generator = torch.Generator().manual_seed(5)
    made = torch.randint(3, 290, (2 * STEPS, 12), generator=generator).tolist()
    for step in bad:
        made[2 * step - 1][4] = BAD
    return [{"input_ids": ids, "labels": ids} for ids in made]


class Seen(TrainerCallback):
    """Trained tensors, moments and rates after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        found = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, parameter in model.named_parameters():
            found |= {f"{name} {key}": value.clone() for key, value in inner.state.get(parameter, {}).items() if torch.is_tensor(value)}
        self.states.append(found)


def train(folder: Path, bad: tuple[int, ...], kind=AdeptTrainer, model=None, resume=None, **adept):
    model, seen = model or poisoned(), Seen()
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1, logging_steps=1, save_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    log = TrainerLog(folder.parent / f"{folder.name}.jsonl")
    log.path.touch()
    callback = AdeptCallback(tiny_models.items(3), refresh_steps=100, log=log, **adept)
    if kind is AdeptTrainer:
        trainer = AdeptTrainer(model, args, adept=callback, train_dataset=rows(bad), callbacks=[seen])
    else:
        freeze_original(model)
        trainer = Trainer(
            model, args, train_dataset=rows(bad), callbacks=[callback, seen], optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2})
        )
    trainer.train(resume_from_checkpoint=resume)
    return seen.states, [json.loads(line) for line in log.path.read_text().splitlines()], trainer


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_first_such_step_stops_the_run_and_names_its_documents(tmp_path: Path) -> None:
    ids = rows((3,))[5]["input_ids"]
    with pytest.raises(InputError) as stop:
        train(tmp_path / "out", (3,), tokenizer=tiny_models.tokenizer())
    said, text = str(stop.value), tiny_models.tokenizer().decode(ids)
    assert said.startswith("step 3: its loss is not finite; its documents begin ") and repr(text[:60]) in said
    assert "weights are finite" in said and "set skip_nonfinite above 0" in said and "\n" not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AdeptTrainer, Trainer])
def test_a_skipped_step_touches_nothing_and_is_counted(tmp_path: Path, kind: type, caplog: pytest.LogCaptureFixture) -> None:
    states, log, trainer = train(tmp_path / "out", (3, 5), kind, skip_nonfinite=2)
    for step in range(1, STEPS):
        assert same(states[step], states[step - 1]) == (step + 1 in (3, 5))
    skipped = [entry for entry in log if entry["event"] == "skipped"]
    assert skipped == [{"event": "skipped", "step": 3, "skipped": 1}, {"event": "skipped", "step": 5, "skipped": 2}]
    losses = {entry["step"]: entry["loss"] for entry in log if entry["event"] == "step"}
    assert [step for step, loss in losses.items() if loss is None] == [3, 5] and all(losses[step] > 1 for step in (1, 2, 4, 6))
    told = [line for line in caplog.messages if "skipped, " in line]
    assert len(told) == 2 and "skipped, 2 of 2 that may be" in told[1]
    assert trainer.state.global_step == STEPS
    with pytest.raises(InputError, match="step 5: .*1 steps were skipped before.*above 1"):
        train(tmp_path / "less", (3, 5), kind, skip_nonfinite=1)


@pytest.mark.slow
def test_without_such_steps_nothing_changes(tmp_path: Path) -> None:
    one, _, _ = train(tmp_path / "one", (), skip_nonfinite=3)
    other, _, _ = train(tmp_path / "other", (), Trainer)
    assert len(one) == STEPS and same(one[-1], train(tmp_path / "again", ())[0][-1])
    assert all(tensor.isfinite().all() for tensor in other[-1].values())


@pytest.mark.slow
def test_the_count_goes_on_with_a_resumed_run(tmp_path: Path) -> None:
    states, _, _ = train(tmp_path / "out", (2, 5), skip_nonfinite=2)
    resumed, log, _ = train(tmp_path / "out", (2, 5), resume=str(tmp_path / "out" / "checkpoint-4"), skip_nonfinite=2)
    assert same(resumed[-1], states[-1]) and [entry["skipped"] for entry in log if entry["event"] == "skipped"] == [1, 2]
    with pytest.raises(InputError, match="step 5: .*1 steps were skipped before"):
        train(tmp_path / "out", (2, 5), resume=str(tmp_path / "out" / "checkpoint-4"), skip_nonfinite=1)


def test_a_gradient_that_overflows_is_told_from_a_loss() -> None:
    model = expand_model(tiny_models.model(), [1])
    freeze_original(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    guard = NonFiniteSteps(1)
    guard.add_batch({"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, torch.tensor(2.0))
    assert not guard.skips(model, 1) and all(parameter.grad is not None for parameter in parameters)
    parameters[3].grad.view(-1)[1] = math.inf
    assert not guard.skips(model, 2, scaled=True)  # a loss scaler finds them itself
    assert guard.skips(model, 2) and all(parameter.grad is None for parameter in parameters)
    guard.add_batch({"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, torch.tensor(2.0))
    parameters[0].grad = torch.full_like(parameters[0], math.nan)
    with pytest.raises(InputError, match=r"step 3: its gradients are not finite; .* begin tokens \[0, 1, 2\], tokens \[3, 4, 5\]"):
        guard.skips(model, 3)


@pytest.mark.slow
def test_copies_that_are_no_numbers_are_neither_saved_nor_resumed(tmp_path: Path) -> None:
    _, _, trainer = train(tmp_path / "out", ())
    name, parameter = next(iter(trainer._trained().items()))
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    for save in (lambda: trainer.save_model(str(tmp_path / "model")), lambda: StagedTrainer._save_trained(trainer, tmp_path)):
        with pytest.raises(InputError, match=f"{name} holds NaN or infinity: training went wrong"):
            save()
    assert not list(tmp_path.glob("model/*.safetensors")) and not (tmp_path / "adept_copies.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("skip", [0, 9])
def test_the_key_of_a_recipe_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: int) -> None:
    expand_checkpoint(tiny_models.checkpoint(tmp_path / "base"), tmp_path / "expanded", [1], steering=tiny_models.items(2))
    load = checkpoint.load_model

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.masked_fill((args[0] == BAD)[..., None], math.nan)
        )
        return model

    monkeypatch.setattr(checkpoint, "load_model", loaded)
    ids = torch.randint(3, 290, (96,), generator=torch.Generator().manual_seed(1)).numpy().astype(np.int32)
    ids[40] = BAD
    documents = WeightedDocuments(Documents(ids, np.arange(0, 97, 12)), np.ones(8))
    settings = TuningSettings(block_size=24, skip_nonfinite=skip, training={"max_steps": 4, "per_device_train_batch_size": 1})
    files = RunFiles(tmp_path / "work", tmp_path / "log.jsonl")

    def tune() -> None:
        text = plan(documents, tiny_models.tokenizer(), settings, 128)
        tune_checkpoint(tmp_path / "expanded", tmp_path / "tuned", text, tiny_models.items(2), {}, files)

    if skip:
        tune()
        events = [json.loads(line)["event"] for line in files.log.read_text().splitlines()]
        assert events.count("skipped") == 1 and (tmp_path / "tuned").is_dir()
    else:
        with pytest.raises(InputError, match="its loss is not finite; its documents begin '.*set skip_nonfinite above 0"):
            tune()
        assert not (tmp_path / "tuned").exists()


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adept_copies.safetensors", "adept_config.json")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_whose_bytes_changed_is_refused_by_name(tmp_path: Path, file: str) -> None:
    train(tmp_path / "out", ())
    folder = tmp_path / "out" / "checkpoint-6"
    assert set(json.loads((folder / "digests.json").read_text())["files"]) >= set(FILES)
    content = bytearray((folder / file).read_bytes())
    content[-len(content) // 3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"checkpoint-6/{file}: corrupt: not the bytes .*delete checkpoint-6, .* from checkpoint-4"):
        train(tmp_path / "out", (), resume=str(folder))
    (folder / file).unlink()
    with pytest.raises(InputError, match=f"checkpoint-6/{file}: missing: delete checkpoint-6"):
        train(tmp_path / "out", (), resume=str(folder))


@pytest.mark.parametrize("digests", [None, "{}", '{"files": {}}', '{"files": {"optimizer.pt": 3}}'])
def test_a_checkpoint_without_its_digests_is_refused(tmp_path: Path, digests: str | None) -> None:
    train(tmp_path / "out", ())
    path = tmp_path / "out" / "checkpoint-6" / "digests.json"
    path.unlink() if digests is None else path.write_text(digests)
    said = "missing, so nothing says" if digests is None else "not the digests of a checkpoint: "
    with pytest.raises(InputError, match=f"checkpoint-6/digests.json: {said}.*delete checkpoint-6, and training goes on from checkpoint-4"):
        train(tmp_path / "out", (), resume=str(path.parent))
