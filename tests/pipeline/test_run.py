"""The whole run from the command line: with two settings only, and killed again and again, ending in the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.cli.main import main
from adept_fast.evaluation.results import EvaluationResults
from tests.support import tiny_models
from tests.support.attempts import Attempts

pytestmark = pytest.mark.slow

PLACES = (
    ("adept_fast.scoring.layer_masking:LayerMasks.measure", 3),  # scoring
    ("adept_fast.expansion.expand_checkpoint:first_importance", 0),
    ("adept_fast.expansion.expand_checkpoint:require_equal_logits", 0),  # expanding, all written but the name
    ("adept_fast.tuning.staged_trainer:save_file", 0),  # the first checkpoint
    ("adept_fast.tuning.adept_callback:apply_rates", 2),  # a refresh
    ("adept_fast.tuning.staged_trainer:save_file", 1),  # a later checkpoint
    ("adept_fast.tuning.staged_trainer:discard>os:unlink", 3),  # an old checkpoint, half deleted
    ("adept_fast.expansion.edit_checkpoint:prove_bytes", 0),  # the tuned model, all written but the name
    ("adept_fast.pipeline.evaluate:evaluate", 1),
)
KILLS = 20
MOMENTS = (  # and the number of its calls to draw from
    ("adept_fast.tuning.adept_callback:score_units", 3),  # a refresh
    ("adept_fast.tuning.adept_callback:apply_rates", 3),
    ("adept_fast.tuning.monitor:corpus_loss", 8),
    ("adept_fast.tuning.staged_trainer:save_file", 3),  # a checkpoint
    ("torch:save", 9),  # its optimizer, schedule and random state
    ("adept_fast.runtime.atomic_files:_sync", 40),
    ("adept_fast.tuning.staged_trainer:discard>os:unlink", 16),  # the old one half deleted
    ("adept_fast.tuning.trainer_log:TrainerLog.write", 12),
    ("adept_fast.data.stream:Stream._next_block", 14),  # streaming
    ("adept_fast.data.shuffled_source:ShuffledSource._fill", 3),
    ("adept_fast.optim.adamw:AdamW.step", 7),
    ("adept_fast.ops.adamw.cpu:adamw*", 7 * 24),  # between two parameters of a step
)
RESUMING = (  # where there is a checkpoint to go on from
    ("adept_fast.data.stream:Stream.load", 1),
    ("adept_fast.tuning.staged_trainer:load_file", 1),  # the copies
    ("torch:load", 3),  # optimizer, schedule, random state
    ("adept_fast.optim.state_dict:_restored", 24),  # between two parameters of the optimizer's state
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_models.checkpoint(folder / "model", "qwen2", attention_dropout=0.1)
    lines = [f"{sentence} It is note {number}.\n" for number, sentence in enumerate(tiny_models.SENTENCES * 5)]
    (folder / "notes.txt").write_text("".join(lines))
    assert len(lines) == 200
    return folder


def settings(folder: Path, output: str) -> list[str]:
    return [
        f"model_name_or_path={folder / 'model'}",
        f"domain={folder / 'notes.txt'}",
        f"output_dir={folder / output}",
        "expand.k=2",
        "tune.max_steps=7",
        "eval.answer_tokens=2",
        "tune.refresh_steps=2",
        "tune.per_device_train_batch_size=2",
        "tune.block_size=64",
        "tune.weight_decay=0.1",
        "tune.max_items=6",
        "score.max_items=20",
        "seed=5",
    ]


@pytest.fixture(scope="module")
def attempts(folder: Path) -> Iterator[Attempts]:
    with Attempts({"ADEPT_FAST_CACHE": str(folder / "cache")}) as made:
        yield made


def artefacts(folder: Path) -> dict[str, object]:
    """Everything a run leaves, without times."""
    scores = json.loads((folder / "scores.json").read_text()) if (folder / "scores.json").exists() else {}
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    evaluation = json.loads((folder / "eval.json").read_text())
    return {
        "scores": {key: value for key, value in scores.items() if key != "seconds"},
        "log": [{key: value for key, value in entry.items() if key not in ("tokens_per_second", "peak_memory")} for entry in log],
        "evaluation": {key: value for key, value in evaluation.items() if key != "seconds"},
        **{name: (folder / name).read_bytes() for name in ("expanded/model.safetensors", "tuned/model.safetensors")},
        "records": [json.loads((folder / name / "adept_config.json").read_text()) for name in ("expanded", "tuned")],
    }


def assert_same_artefacts(found: Path, expected: Path) -> None:
    ours, theirs = artefacts(found), artefacts(expected)
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert not list(found.rglob(".adept_fast-*")) and (found / "report.html").is_file()


@pytest.mark.nightly
def test_killed_at_every_stage_the_run_ends_in_the_same_bits(folder: Path, attempts: Attempts) -> None:
    code, whole = attempts.run(["run", *settings(folder, "whole")], folder / "said")
    assert code == 0 and "resuming" not in whole, whole
    resumptions = 0
    for place, calls in PLACES:
        code, said = attempts.run(["run", *settings(folder, "killed")], folder / "said", place, calls)
        assert code == -9, f"{place} was not reached: {said}"
        resumptions += "resuming from checkpoint-" in said
    code, said = attempts.run(["run", *settings(folder, "killed")], folder / "said")
    assert code == 0 and resumptions == 4, said
    assert_same_artefacts(folder / "killed", folder / "whole")


@pytest.mark.nightly
def test_killed_at_random_moments_a_streamed_run_ends_in_the_same_bits(folder: Path, attempts: Attempts) -> None:
    """Two domain files, one annealed, and replay, shuffled in windows.

    Some moments by the clock, anywhere in a run, the others at a random call of each place where state is made, written or read.
    """
    remarks = [f"{sentence} It is remark {number}." for number, sentence in enumerate(tiny_models.SENTENCES)]
    (folder / "first.txt").write_text("\n\n".join(remarks[::2]))
    (folder / "second.txt").write_text("\n\n".join(remarks[1::2]))
    (folder / "replay.jsonl").write_text("\n".join(json.dumps({"text": f"Replay {number} of {number * 7}."}) for number in range(60)))
    given = [
        "expand.layers=[1,2]",
        f"domain=[{{path: {folder / 'first.txt'}, share: 0.5, share_end: 0.2}}, {folder / 'second.txt'}]",
        f"tune.replay={{path: {folder / 'replay.jsonl'}, share: 0.2}}",
        "tune.shuffle_window=16",
        f"eval.domain={folder / 'notes.txt'}",
    ]
    started = time.perf_counter()
    code, said = attempts.run(["run", *settings(folder, "undisturbed"), *given], folder / "said")
    seconds = time.perf_counter() - started
    assert code == 0, said
    drawn = [entry for entry in artefacts(folder / "undisturbed")["log"] if entry["event"] == "sources"]
    shares = dict(zip(("first.txt", "second.txt", "replay.jsonl"), (0.35, 0.45, 0.2), strict=True))
    assert [entry["step"] for entry in drawn] == [*range(1, 8)]
    assert drawn[-1]["shares"] == {str(folder / name): pytest.approx(share, abs=0.05) for name, share in shares.items()}
    random, kills, runs = Random(6), 0, 0
    left = {False: random.sample(MOMENTS, len(MOMENTS)), True: random.sample(RESUMING, len(RESUMING))}
    while kills < KILLS or left[False] or left[True]:
        output = f"disturbed{runs}"
        resumes = bool(left[True]) and any((folder / output).rglob("checkpoint-*/trainer_state.json"))
        moment = {"seconds": seconds * random.random()}
        if kills % 4 and left[resumes]:
            place, calls = left[resumes][-1]
            moment = {"place": place, "calls": random.randrange(calls)}
        code, said = attempts.run(["run", *settings(folder, output), *given], folder / "said", **moment)
        assert code in (0, -9), said
        kills += code == -9
        if code == 0:
            assert_same_artefacts(folder / output, folder / "undisturbed")
            runs += 1
        elif "place" in moment:
            left[resumes].pop()
    code, said = attempts.run(["run", *settings(folder, output), *given], folder / "said")
    assert code == 0, said
    assert_same_artefacts(folder / output, folder / "undisturbed")


def test_a_text_file_and_a_model_are_enough(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(folder / "cache"))
    monkeypatch.setattr("adept_fast.runtime.progress.INTERVAL", 0)
    output = folder / "simple"
    arguments = ["run", f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={output}"]
    assert main(arguments) == 0
    said, shown = capsys.readouterr()
    lines = [line.partition(": ")[0] for line in shown.splitlines()]
    assert {"scoring", "writing expanded", "tuning", "writing tuned", str(folder / "model")} <= {*lines} and "\r" not in shown, shown
    assert "plan: " in said and "epochs over" in said and "every original tensor is bit-equal" in said
    assert {path.name for path in output.iterdir()} >= {
        "scores.json", "scores.png", "expanded", "tuned", "trainer_log.jsonl", "eval.json", "report.html",
    }  # fmt: skip
    result = json.loads((output / "eval.json").read_text())["models"]
    assert result["base"]["domain"]["items"] >= 1 and result["tuned"]["domain"]["loss"] != result["base"]["domain"]["loss"]
    base, tuned = load_file(folder / "model" / "model.safetensors"), load_file(output / "tuned" / "model.safetensors")
    record = json.loads((output / "tuned" / "adept_config.json").read_text())
    places = {entry["copied_from"]: entry["layer"] for entry in record["inserted"]}
    for name, tensor in base.items():
        parts = name.split(".")
        if parts[1] == "layers":
            index = int(parts[2])
            parts[2] = str(index + sum(source < index for source in places))
        assert tensor.equal(tuned[".".join(parts)]), name
    card = ModelCard.load(output / "tuned" / "README.md")
    assert card.data.base_model == "model" and "`notes.txt`" in card.text and str(folder) not in str(card)
    change = EvaluationResults.load(output / "eval.json").changes["tuned"].domain.loss
    assert f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" in card.text
    assert fingerprint(output / "tuned") == json.loads((output / "eval.json").read_text())["inputs"]["tuned model"]
    assert main(arguments) == 0 and capsys.readouterr().out.count("up to date") == 4
    (output / "tuned" / "README.md").write_text("mine")
    assert main(arguments) == 0 and "README.md: edited, so it stays as it is" in capsys.readouterr().out
    assert (output / "tuned" / "README.md").read_text() == "mine"
    assert main(["run", str(output / "recipe.yaml")]) == 0 and capsys.readouterr().out.count("up to date") == 4
    assert main(["verify", *arguments[1:]]) == 0 and main(["verify", *arguments[1:], "dtype=bfloat16"]) == 0
    assert checkpoint.load_model(output / "tuned").adept_config.copies
