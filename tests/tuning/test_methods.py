"""Each method that a recipe may name, through the whole run: what moved, at what rates, and what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import load
from adept_fast.pipeline.run import run as run_stages
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.tuning.methods import METHODS
from tests.support import tiny_models
from tests.support.news import heard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny_models.checkpoint(folder / "model")
    (folder / "notes.txt").write_text("\n\n".join(f"{text} It is note {number}." for number, text in enumerate(tiny_models.SENTENCES * 2)))
    (folder / "general.txt").write_text("\n\n".join(f"General text {number} on {number * 3} matters." for number in range(60)))
    return folder


def run(folder: Path, method: str, output: str, *more: str) -> tuple[Path, list[dict]]:
    recipe = load(
        None,
        [
            f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={folder / output}", f"method={method}",
            "expand.k=2", "score.max_items=8", "score.loss=all", "tune.max_steps=3", "tune.refresh_steps=2", "tune.eval_steps=1",
            "tune.block_size=32", "tune.max_items=4", "tune.lora_rank=4", "tune.learning_rate=0.01", "tune.weight_decay=0.1",
            "eval.max_items=6", "eval.answer_tokens=2", "seed=3", *more,
        ],
    )  # fmt: skip
    directory = RunDirectory(recipe.folder)
    with directory.held(), heard() as said:
        run_stages(recipe, directory)
    assert (f"warning: method={method} copies no layers: expand.k has no effect" in said) is not METHODS[method].copies
    log = [json.loads(line) for line in (folder / output / "trainer_log.jsonl").read_text().splitlines()]
    return folder / output, log


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
    replay = [f"tune.replay={{path: {folder / 'general.txt'}, share: 0.4}}"] if method == "replay" else []
    output, log = run(folder, method, method, *replay)
    base, tuned = load_file(folder / "model" / "model.safetensors"), load_file(output / "tuned" / "model.safetensors")
    evaluation = json.loads((output / "eval.json").read_text())["models"]
    assert evaluation["tuned"]["domain"]["loss"] != evaluation["base"]["domain"]["loss"] and (output / "report.html").is_file()
    steps = [entry for entry in log if entry["event"] == "step"]
    assert len(steps) == 3 and [entry["step"] for entry in log if entry["event"] == "evaluation"] == [0, 1, 2, 3]
    assert next(entry for entry in log if entry["event"] == "plan")["tokens"] == 3 * 4 * 32
    rates = [set(entry["rates"].values()) for entry in log if entry["event"] == "refresh"]
    if METHODS[method].copies:
        assert len(tuned) > len(base)
        record = json.loads((output / "tuned" / "adept_config.json").read_text())
        layers = [entry["copied_from"] for entry in record["inserted"]]
        assert (layers == [1, 3]) or not METHODS[method].uniform
        assert (output / "scores.json").exists() != METHODS[method].uniform
        assert (len(rates), all(values == {1.0} for values in rates)) == (2, not METHODS[method].rates)
        return
    assert not rates and tuned.keys() == base.keys() and not (output / "expanded").exists()
    record = json.loads((output / "tuned" / "baseline.json").read_text())
    moved = {name for name in base if not tuned[name].equal(base[name])}
    assert record["method"] == method and record["changed_tensors"] == len(moved) and record["inputs"]["method"] == method
    if method == "lora":
        assert moved == {f"{name}.weight" for name in record["modules"]} and len(moved) == 4 * 7
        assert all("proj" in name for name in moved) and record["trained"] == sum(4 * sum(base[name].shape) for name in moved)
    else:
        assert moved == set(base) and record["trained"] == sum(tensor.numel() for tensor in base.values())
    assert type(AutoModelForCausalLM.from_pretrained(output / "tuned")).__name__ == "LlamaForCausalLM"


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_baseline_goes_on_to_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
    from adept_fast.tuning import baselines

    class Killed(BaseException):
        pass

    def kill(trainer: object, model: object, trial: object) -> None:
        original(trainer, model, trial)
        raise Killed

    original = baselines.StagedTrainer._save_checkpoint
    for method in ("full", "lora"):
        whole, log = run(folder, method, f"whole-{method}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(baselines.StagedTrainer, "_save_checkpoint", kill)
            run(folder, method, f"cut-{method}")
        resumed, again = run(folder, method, f"cut-{method}")
        ours, theirs = (load_file(output / "tuned" / "model.safetensors") for output in (resumed, whole))
        assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
        for entry in [*log, *again]:
            for key in ("tokens_per_second", "peak_memory"):
                entry.pop(key, None)
        assert again == log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=lora2"], "method must be one of"),
        (["method=replay"], "needs a corpus to replay"),
        (["method=uniform", "expand.layers=[1]"], "spaces the copies evenly"),
        (["method=full", "tune.anchor_weight=0.5"], "tune.anchor_weight"),
        (["method=lora", "tune.general_limit=0.1"], "tune.general_limit"),
        (["method=replay", "tune.replay=a.txt", "eval.general_limit=0.1"], "eval.general_limit"),
    ],
)
def test_methods_that_do_not_fit_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(None, ["model_name_or_path=M", "domain=d.txt", *settings])
