"""A run that was interrupted goes on by the same command once a row that lies ahead of it was repaired."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.attempts import Attempts

GOOD = [json.dumps({"text": f"{sentence} It is note {number}."}) for number, sentence in enumerate(tiny_models.SENTENCES * 4)]
EMPTY, MALFORMED, BEHIND = json.dumps({"text": None}), '{"text"', 3
AHEAD = 60
PLACE = "adept_fast.tuning.adept_callback:apply_rates"  # a refresh: the third is that of step 4, before its checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    tiny_models.checkpoint(folder / "model", "qwen2", attention_dropout=0.1)
    (folder / "probe.jsonl").write_text("\n".join(json.dumps({"text": f"probe {number}"}) for number in range(9)))
    return folder


@pytest.fixture(scope="module")
def attempts(folder: Path) -> Iterator[Attempts]:
    with Attempts({"ADEPT_FAST_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}) as made:
        yield made


def run(attempts: Attempts, folder: Path, output: str, *more: str, **moment: object) -> tuple[int, str]:
    given = ["model_name_or_path=model", f"output_dir={output}", "probe=probe.jsonl", "expand.layers=[1]", "tune.max_steps=6"]
    given += ["tune.refresh_steps=2", "tune.per_device_train_batch_size=4", "tune.block_size=128", "tune.weight_decay=0.1", "seed=5"]
    given += ["tune.max_items=4", "tune.shuffle_window=8"]
    return attempts.run(["run", *given, *more], folder / "said", folder=str(folder), **moment)


def with_row(number: int, row: str) -> str:
    return "\n".join([*GOOD[:number], row, *GOOD[number + 1 :]])


def losses(folder: Path) -> list[tuple[int, float]]:
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def same(folder: Path, found: str, expected: str) -> None:
    tuned = [folder / name / "tuned" for name in (found, expected)]
    assert tuned[0].joinpath("model.safetensors").read_bytes() == tuned[1].joinpath("model.safetensors").read_bytes()
    records = [json.loads((path / "adept_config.json").read_text()) for path in tuned]
    assert records[0]["inputs"] == records[1]["inputs"]
    ours, theirs = losses(folder / found), losses(folder / expected)
    assert ours == theirs and len(ours) == 6


@pytest.mark.parametrize(("spoilt", "key"), [(MALFORMED, "malformed_rows=1"), (EMPTY, "malformed_rows=0")])
def test_a_killed_run_goes_on_over_the_repaired_file(folder: Path, attempts: Attempts, spoilt: str, key: str) -> None:
    name = "malformed" if spoilt == MALFORMED else "empty"
    domain, given = folder / f"{name}.jsonl", (f"domain={name}.jsonl", "tune.streaming=true", key)
    domain.write_text(with_row(AHEAD, spoilt))
    code, said = run(attempts, folder, name, *given, place=PLACE, calls=2)
    assert code == -9 and [*(folder / name / "checkpoints").glob("checkpoint-2")], said

    domain.write_text(with_row(BEHIND, json.dumps({"text": "Another text."})))
    code, said = run(attempts, folder, name, *given)
    assert code == 2 and f"{name}.jsonl: changed where this run has read it already" in said and "restore that" in said

    domain.write_text("\n".join(GOOD))
    code, said = run(attempts, folder, name, *given)
    assert code == 0 and "resuming from checkpoint-2" in said, said
    assert f"{name}.jsonl: changed since, but not where it was read: going on with it as it is now" in said
    code, said = run(attempts, folder, f"{name}-whole", *given)
    assert code == 0, said
    same(folder, name, f"{name}-whole")
    code, said = run(attempts, folder, name, *given)
    assert code == 0 and "tuned: up to date" in said, "its record names what it was made from in the end"


def test_a_run_stopped_by_what_datasets_cannot_read_goes_on_once_that_is_repaired(folder: Path, attempts: Attempts) -> None:
    (folder / "parts").mkdir()
    for part in range(4):
        (folder / "parts" / f"train-{part}.jsonl").write_text("\n".join(GOOD[part * 20 : part * 20 + 20]))
    given = ("domain={path: parts, split: train}", "tune.streaming=true")
    spoil = {"before": "tests.pipeline.test_repair:spoil_while_running"}
    code, said = run(attempts, folder, "parts-run", *given, **spoil)
    assert code == 2 and "parts: cannot be read behind row " in said and "repair it, and the same command goes on" in said, said
    (folder / "parts" / "train-3.jsonl").write_text("\n".join(GOOD[60:80]))
    code, said = run(attempts, folder, "parts-run", *given)
    assert code == 0 and "resuming from checkpoint-" in said, said
    code, said = run(attempts, folder, "parts-whole", *given)
    assert code == 0, said
    same(folder, "parts-run", "parts-whole")


def spoil_while_running(request: dict) -> None:
    """In the run: the last part loses its end at the second refresh, as on a disk that fails."""
    from adept_fast.tuning import adept_callback

    apply_rates, left = adept_callback.apply_rates, [2]

    def spoilt(*given, **more):
        left[0] -= 1
        if not left[0]:
            Path("parts", "train-3.jsonl").write_text("\n".join([*GOOD[60:70], MALFORMED]))
        return apply_rates(*given, **more)

    adept_callback.apply_rates = spoilt


def test_in_memory_a_repaired_row_is_another_corpus_and_said_to_be_one(folder: Path, attempts: Attempts) -> None:
    domain, given = folder / "held.jsonl", ("domain=held.jsonl", "tune.streaming=false", "malformed_rows=1")
    domain.write_text(with_row(AHEAD, MALFORMED))
    code, said = run(attempts, folder, "memory", *given, place=PLACE, calls=0)
    assert code == -9 and not [*(folder / "memory" / "checkpoints").glob("checkpoint-*")], said
    domain.write_text(with_row(AHEAD, EMPTY))
    code, said = run(attempts, folder, "memory", *given, place=PLACE, calls=2)
    assert code == -9 and [*(folder / "memory" / "checkpoints").glob("checkpoint-2")], said
    domain.write_text("\n".join(GOOD))
    code, said = run(attempts, folder, "memory", *given)
    told = "domain: a row that was repaired, added or taken away makes another corpus, trained on in another order"
    assert code == 2 and f"checkpoints was made with other settings ({told}): choose another output_dir, or remove it to redo it" in said
    domain.write_text(with_row(AHEAD, MALFORMED))
    code, said = run(attempts, folder, "memory", *given)
    assert code == 0 and "resuming from checkpoint-2" in said, "left out for another reason, so the same corpus"
