"""TrainingArguments that touch saving, loading or the model itself: each does in our trainers what it says, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

from adept_fast import AdamW
from adept_fast.errors import InputError
from adept_fast.expansion.expand_model import expand_model
from adept_fast.pipeline.recipe import load
from adept_fast.settings.training_arguments import REFUSED
from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.staged_trainer import StagedTrainer
from tests.support import tiny_models
from tests.tuning.test_adept_trainer import arguments, blocks, same, weights

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_chosen"}


class Scored(AdeptTrainer):
    """Evaluation finds what `scores` says of the step; keeps the weights that it saw."""

    scores = {2: 0.3, 4: 0.9, 6: 0.5, 8: 0.4}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        found = super().evaluation_loop(*args, **kwargs)
        found.metrics["eval_chosen"] = self.scores[self.state.global_step]
        self.seen = {**getattr(self, "seen", {}), self.state.global_step: weights(self.model)}
        return found


def trainer(
    folder: Path, kind: type[AdeptTrainer] = AdeptTrainer, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any
) -> AdeptTrainer:
    model = expand_model(tiny_models.model(), [0, 2])
    adept = AdeptCallback(tiny_models.items(3), refresh_steps=2)
    args = arguments(folder, lr_scheduler_type="constant", **changes)
    return kind(model, args, adept=adept, train_dataset=blocks(), eval_dataset=blocks(), callbacks=list(callbacks))


@pytest.mark.slow
@pytest.mark.parametrize(("greater", "best"), [(True, 4), (False, 2)])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_the_best_model_is_kept_and_loaded(tmp_path: Path, limit: int | None, greater: bool, best: int) -> None:
    made = trainer(tmp_path, Scored, max_steps=8, save_total_limit=limit, greater_is_better=greater, **BEST)
    made.train()
    assert same(weights(made.model), made.seen[best]) and not same(made.seen[best], made.seen[8])
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"checkpoint-{step}" for step in ((best,) if limit == 1 else (best, 8) if limit == 2 else (2, 4, 6, 8))}
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}") and made.state.best_global_step == best
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    if limit != 1:
        again = trainer(tmp_path, Scored, max_steps=8, save_total_limit=limit, greater_is_better=greater, **BEST)
        again.train(resume_from_checkpoint=True)
        assert same(weights(again.model), made.seen[best])


@pytest.mark.slow
def test_a_killed_run_remembers_its_best(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", Scored, max_steps=8, save_total_limit=1, **BEST)
    whole.train()
    trainer(tmp_path / "cut", Scored, max_steps=6, save_total_limit=2, **{**BEST, "load_best_model_at_end": False}).train()
    again = trainer(tmp_path / "cut", Scored, max_steps=8, save_total_limit=1, **BEST)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), weights(whole.model)) and again.state.best_metric == 0.9


@pytest.mark.slow
def test_only_the_best_is_saved_where_that_is_asked(tmp_path: Path) -> None:
    made = trainer(tmp_path, Scored, max_steps=8, save_strategy="best", **BEST)
    made.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"} and same(weights(made.model), made.seen[4])


@pytest.mark.slow
def test_callback_states_are_restored(tmp_path: Path) -> None:
    """Patience counts on; ours restores itself, without being made anew."""
    stop = {**BEST, "save_total_limit": None, "restore_callback_states_from_checkpoint": True}
    whole = trainer(tmp_path / "whole", Scored, (EarlyStoppingCallback(2),), max_steps=20, **stop)
    whole.scores = {**Scored.scores, 10: 0.2, 12: 0.1}
    whole.train()
    assert whole.state.global_step == 8
    again = trainer(tmp_path / "whole", Scored, (EarlyStoppingCallback(2),), max_steps=20, **stop)
    adept = again._adept
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert again.state.global_step == 8 and adept in again.callback_handler.callbacks and same(weights(again.model), weights(whole.model))


@pytest.mark.slow
def test_the_callback_of_a_stock_trainer_says_that_it_cannot_be_made_anew(tmp_path: Path) -> None:
    from adept_fast.expansion.expand_model import freeze_original

    model = expand_model(tiny_models.model(), [0, 2])
    freeze_original(model)
    args = arguments(tmp_path, restore_callback_states_from_checkpoint=True)
    adept = AdeptCallback(tiny_models.items(3))
    with pytest.raises(InputError, match="restore_callback_states_from_checkpoint"):
        Trainer(model, args, train_dataset=blocks(), callbacks=[adept], optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2})).train()


@pytest.mark.slow
def test_a_stock_trainer_that_would_train_the_base_is_refused(tmp_path: Path) -> None:
    for allowed in (False, True):
        model = expand_model(tiny_models.model(), [0, 2])
        adept = AdeptCallback(tiny_models.items(3), train_original=allowed)
        given = {"train_dataset": blocks(), "callbacks": [adept], "optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-2})}
        made = Trainer(model, arguments(tmp_path, max_steps=1), **given)
        before = weights(model)
        if not allowed:
            with pytest.raises(InputError, match=r"39 parameters outside the copies would train too, first .*freeze_original\(model\)"):
                made.train()
        else:
            made.train()
        assert same(before, weights(model)) is not allowed


@pytest.mark.parametrize("use_cache", [True, False, None])
def test_the_config_is_saved_and_left_as_it_was(tmp_path: Path, use_cache: bool | None) -> None:
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
            assert model.config.use_cache is False
            made.save_model(str(tmp_path / "within"))
            assert model.config.use_cache is False

    model = expand_model(tiny_models.model(), [0, 2])
    if use_cache is None:
        del model.config.use_cache
    else:
        model.config.use_cache = use_cache
    args = arguments(tmp_path / "work", max_steps=1)
    made = AdeptTrainer(model, args, adept=AdeptCallback(tiny_models.items(3)), train_dataset=blocks(), eval_dataset=blocks())
    made.add_callback(Saves())
    assert vars(model.config).get("use_cache") is use_cache
    made.train()
    made.evaluate()
    assert vars(model.config).get("use_cache") is use_cache
    made.save_model(str(tmp_path / "after"))
    for name in ("within", "after"):
        assert json.loads((tmp_path / name / "config.json").read_text()).get("use_cache") is use_cache
    if use_cache is not None:
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
        assert same(weights(read), weights(model)) and read.config.use_cache is use_cache


def test_a_whole_model_is_what_push_to_hub_would_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.train()
    uploaded: list[set[str]] = []

    class Hub:
        def upload_folder(self, folder_path: str, **kwargs: Any) -> None:
            uploaded.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    made.hub_model_id, made.push_in_progress = "someone/model", None
    monkeypatch.setattr(made, "create_model_card", lambda **kwargs: None)
    made.push_to_hub()
    assert {"model.safetensors", "config.json"} <= uploaded[0] and "adept_copies.safetensors" not in uploaded[0]
    assert same(load_file(tmp_path / "model.safetensors"), weights(made.model))


GIVEN = {
    "auto_find_batch_size": True, "enable_jit_checkpoint": True, "use_cache": True, "bf16_full_eval": True, "fp16_full_eval": True,
    "optim_args": "a=1", "optim_target_modules": "all-linear",
}  # fmt: skip


@pytest.mark.parametrize("name", [*GIVEN, "optim", "push_to_hub", "accelerator_config", "gradient_checkpointing"])
@pytest.mark.parametrize("kind", [AdeptTrainer, StagedTrainer])
def test_what_cannot_work_is_refused_when_the_trainer_is_made(tmp_path: Path, name: str, kind: type) -> None:
    given = {
        "optim": {"optim": "adafactor"},
        "push_to_hub": {"push_to_hub": True},
        "accelerator_config": {"accelerator_config": {"split_batches": True}},
        "gradient_checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }.get(name) or {name: GIVEN[name]}
    args = arguments(tmp_path / "work", use_cpu=True, **given)
    model = expand_model(tiny_models.model(), [0, 2])
    adept = {"adept": AdeptCallback(tiny_models.items(3))} if kind is AdeptTrainer else {}
    if name == "gradient_checkpointing" and kind is StagedTrainer:
        StagedTrainer(model, args, train_dataset=blocks())  # of all parameters: each layer's input has a gradient
        return
    with pytest.raises(InputError, match=f"^{name}.*: .*leave|^{name}.*hub_strategy='end'"):
        kind(model, args, train_dataset=blocks(), **adept)
    assert not (tmp_path / "work").exists()


def test_a_recipe_refuses_the_same() -> None:
    assert REFUSED.keys() == {*GIVEN, "parallelism_config"}
    for name, value in GIVEN.items():
        with pytest.raises(InputError, match=f"tune.{name}: "):
            load(None, ["model_name_or_path=M", "domain=d.txt", f"tune.{name}={json.dumps(value)}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"save_only_model": True},
        {"include_num_input_tokens_seen": "all", "average_tokens_across_devices": False, "eval_strategy": "epoch", "eval_on_start": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_works_goes_on_to_the_same_bits(tmp_path: Path, changes: dict) -> None:
    """From a step within the second epoch, of 13 steps each."""
    args = {"use_cpu": True, "save_steps": 14, **changes}
    whole = trainer(tmp_path / "whole", max_steps=16, **args)
    before = weights(whole.model)
    whole.train()
    assert not same(before, weights(whole.model)) and all(torch.isfinite(tensor).all() for tensor in weights(whole.model).values())
    again = trainer(tmp_path / "whole", max_steps=16, **args)
    checkpoint = str(tmp_path / "whole" / "checkpoint-14")
    if "save_only_model" in changes:
        with pytest.raises(InputError, match="holds no optimizer.pt"):
            again.train(resume_from_checkpoint=checkpoint)
    else:
        again.train(resume_from_checkpoint=checkpoint)
        assert same(weights(whole.model), weights(again.model))
