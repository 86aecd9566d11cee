"""A recipe's run goes on to more steps, killed or ended; what changes no bit bars nothing, what changes the run is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import tiny_models
from tests.support.attempts import Attempts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    tiny_models.checkpoint(folder / "model", "qwen2", attention_dropout=0.1)
    (folder / "notes.txt").write_text("\n\n".join(f"{text} It is note {number}." for number, text in enumerate(tiny_models.SENTENCES * 3)))
    return folder


@pytest.fixture(scope="module")
def attempts(folder: Path) -> Iterator[Attempts]:
    with Attempts({"ADEPT_FAST_CACHE": str(folder / "cache")}) as made:
        yield made


class Runs:
    def __init__(self, folder: Path, attempts: Attempts) -> None:
        self.folder, self.attempts = folder, attempts

    def __call__(self, output: str, steps: int, *more: str, command: str = "run", code: int = 0, place: str = "", calls: int = 0) -> str:
        given = [
            command, f"model_name_or_path={self.folder / 'model'}", f"domain={self.folder / 'notes.txt'}",
            f"output_dir={self.folder / output}", "expand.layers=[1,2]", f"tune.max_steps={steps}", "tune.refresh_steps=2",
            "eval.answer_tokens=2",
            "tune.per_device_train_batch_size=2", "tune.block_size=48", "tune.weight_decay=0.1", "tune.learning_rate=0.005",
            "tune.max_items=6", "tune.lr_scheduler_type=constant", "eval.max_items=6", "seed=5", *more,
        ]  # fmt: skip
        found, said = self.attempts.run(given, self.folder / "said", place, calls)
        assert found == code, said
        return said

    def log(self, output: str, *events: str) -> list[dict]:
        entries = [json.loads(line) for line in (self.folder / output / "trainer_log.jsonl").read_text().splitlines()]
        timed = ("tokens_per_second", "peak_memory")
        return [{key: value for key, value in entry.items() if key not in timed} for entry in entries if entry["event"] in events]

    def tuned(self, output: str) -> dict:
        return load_file(self.folder / output / "tuned" / "model.safetensors")

    def record(self, output: str, name: str = "adept_config.json") -> dict:
        return json.loads((self.folder / output / "tuned" / name).read_text())


@pytest.fixture(scope="module")
def run(folder: Path, attempts: Attempts) -> Runs:
    return Runs(folder, attempts)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_run_that_had_ended_goes_on_to_the_bits_of_a_longer_one(run: Runs, folder: Path) -> None:
    run("straight", 10)
    run("two", 6)
    earlier, evaluation = run.tuned("two"), (folder / "two" / "eval.json").read_text()
    said = run("two", 10, place="adept_fast.runtime.atomic_files:_exchange", code=-9)
    assert "tune.max_steps changed: it stands until training has gone on" in said and "going on from step 6: 6 steps became 10" in said
    assert same(run.tuned("two"), earlier), "the earlier model is there until the new one is"
    said = run("two", 10)
    assert same(run.tuned("two"), run.tuned("straight")) and not same(run.tuned("two"), earlier)
    for event in ("step", "refresh", "end"):
        assert run.log("two", event) == run.log("straight", event), event
    assert [(entry["step"], entry["steps"]) for entry in run.log("two", "plan")] == [(0, 6), (6, 10)]
    assert (folder / "two" / "eval.json").read_text() != evaluation and "10 steps" in (folder / "two" / "report.html").read_text()
    inputs = run.record("two")["inputs"]
    assert inputs["tune.max_steps"] == 10 and [entry["steps"] for entry in inputs["extended"]] == [[6, 10]]
    assert run("two", 10).count("up to date") == 3 and not list((folder / "two").glob(".partial*"))


@pytest.mark.nightly
def test_what_changes_no_bit_bars_nothing(run: Runs, folder: Path) -> None:
    """Killed at a checkpoint, then ended."""
    changed = [
        "tune.logging_steps=2", "tune.save_steps=3", "tune.save_total_limit=3", "tune.eval_steps=3", "tune.dataloader_num_workers=1",
        "tune.run_name=other", "tune.gradient_checkpointing=true", "tune.adam_beta1=0.9", "tune.lora_rank=3", "tune.anchor_tokens=9",
        "tune.per_device_train_batch_size=1", "tune.gradient_accumulation_steps=2",
    ]  # fmt: skip
    run("whole", 6)
    run("killed", 6, place="adept_fast.tuning.staged_trainer:save_file", calls=2, code=-9)
    said = run("killed", 6, *changed[:-2])
    assert "resuming from checkpoint-4" in said and same(run.tuned("killed"), run.tuned("whole"))
    stood = (folder / "killed" / "tuned" / "model.safetensors").stat().st_mtime_ns
    assert "tuned: up to date" in run("killed", 6, *changed)
    assert (folder / "killed" / "tuned" / "model.safetensors").stat().st_mtime_ns == stood
    assert [entry["step"] for entry in run.log("killed", "step")] == [1, 2, 3, 4, 6]


def test_what_changes_the_run_is_named(run: Runs, folder: Path) -> None:
    run("ended", 4)
    before = {path: path.read_bytes() for path in (folder / "ended").rglob("*") if path.is_file()}
    for given, named in (
        ("tune.weight_decay=0.2", r"tune.weight_decay"),
        ("tune.per_device_train_batch_size=3", "tune.per_device_train_batch_size"),
        ("tune.rate_map=paper", "tune.rate_map"),
        ("tune.max_items=2", "steering items"),
        ("tune.max_steps=2", "checkpoint-4 is past the run's 2 steps: give more (tune.max_steps)"),
        ("tune.lr_scheduler_type=linear", "linear would have given step"),
    ):
        assert named in run("ended", 4, given, command="tune", code=2), given
    assert {path: path.read_bytes() for path in (folder / "ended").rglob("*") if path.is_file()} == before
    run("begun", 6, place="adept_fast.tuning.staged_trainer:save_file", calls=2, code=-9)
    assert "(tune.weight_decay: 0.1, now 0.2)" in run("begun", 6, "tune.weight_decay=0.2", command="tune", code=2)
    assert "other settings (tune.block_size: 48, now 32)" in run("begun", 6, "tune.block_size=32", command="tune", code=2)
    run("early", 6, place="adept_fast.tuning.staged_trainer:save_file", code=-9)
    assert "resuming" not in run("early", 2, "tune.block_size=32", command="tune"), "nothing was saved: it begins"


@pytest.mark.nightly
def test_another_schedule_is_accepted_by_a_key_and_recorded(run: Runs) -> None:
    cosine = ("tune.lr_scheduler_type=cosine", "tune.warmup_steps=0.5")
    run("cosine", 4, *cosine)
    said = run("cosine", 8, *cosine, code=2)
    assert "4 steps became 8, and cosine would have given step 4 a learning rate of" in said and "tune.extend=True goes on" in said
    said = run("cosine", 8, *cosine, "tune.extend=true")
    assert "not what as many from the start would have given (extend)" in said
    assert [entry["learning_rate"] for entry in run.log("cosine", "step")][:5] == [0, 0.0025, 0.005, 0.0025, pytest.approx(0.00375)]
    extended = run.record("cosine")["inputs"]["extended"]
    assert [(entry["step"], entry["steps"], entry["as_from_the_start"]) for entry in extended] == [(4, [4, 8], False)]
    assert "tuned: up to date" in run("cosine", 8, *cosine)


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_baseline_goes_on_too(run: Runs, method: str) -> None:
    given = (f"method={method}", "tune.lora_rank=4")
    run(f"{method}-straight", 5, *given)
    run(f"{method}-two", 3, *given)
    run(f"{method}-two", 5, *given)
    assert same(run.tuned(f"{method}-two"), run.tuned(f"{method}-straight"))
    assert run.record(f"{method}-two", "baseline.json")["inputs"]["extended"][0]["steps"] == [3, 5]


@pytest.mark.nightly
def test_a_stream_goes_on_where_its_mixture_does_not_move(run: Runs, folder: Path) -> None:
    (folder / "other.txt").write_text("\n\n".join(f"Remark {number} on {number * 3} things." for number in range(90)))
    for name, end in (("steady", ""), ("annealed", ", share_end: 0.1")):
        mixture = f"domain=[{{path: {folder / 'notes.txt'}, share: 0.6{end}}}, {folder / 'other.txt'}]"
        run(name, 4, mixture)
        if end:
            assert "over which the shares of the sources move otherwise: tune.extend=True" in run(name, 8, mixture, code=2)
            run(name, 8, mixture, "tune.extend=true")
        else:
            run("steady-straight", 8, mixture)
            run(name, 8, mixture)
            assert same(run.tuned(name), run.tuned("steady-straight"))
            assert run.log(name, "sources") == run.log("steady-straight", "sources")


def test_without_a_checkpoint_nothing_can_go_on(run: Runs, folder: Path) -> None:
    run("gone", 2)
    (folder / "gone" / "checkpoints").rename(folder / "elsewhere")
    assert "holds no checkpoint to go on from" in run("gone", 4, code=2)
