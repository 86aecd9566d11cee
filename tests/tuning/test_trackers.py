"""What report_to sends to trackers: losses, held-out losses, the forgetting meter, the anchor, and unit rates by kind, not by unit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adept_fast.cli.main import main
from tests.support import tiny_models


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model", "qwen2")
    Path("notes.txt").write_text("\n\n".join(f"{text} It is note {number}." for number, text in enumerate(tiny_models.SENTENCES)))
    common = ["model_name_or_path=model", "domain=notes.txt", "expand.layers=[1,2]", "seed=3", "tune.max_items=4"]
    return [*common, "tune.max_steps=4", "tune.refresh_steps=2", "tune.block_size=32", "tune.per_device_train_batch_size=1"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adept", "full"])
def test_tensorboard_gets_what_the_log_has(given: list[str], method: str) -> None:
    given = [*given, f"method={method}", "tune.report_to=tensorboard"]
    if method == "adept":
        given += ["tune.anchor_weight=0.5", "tune.anchor_every=2", "tune.general_limit=9"]
        assert main(["expand", *given]) == 0
    assert main(["tune", *given]) == 0
    (events,) = Path("adept_out/checkpoints/runs").iterdir()
    reader = EventAccumulator(str(events))
    reader.Reload()
    steps = {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert steps["train/loss"] == steps["train/tokens_per_second"] == [1, 2, 3, 4]
    assert steps["eval/general_loss"] == steps["eval/domain_loss"] == [0, 2, 4]
    if method == "adept":
        assert steps["train/anchor_kl"] == [3] and steps["train/meter_rise"] == [0, 2, 4]
        kinds = {tag for tag in steps if tag.startswith("train/rate/")}
        assert {"train/rate/min", "train/rate/mean", "train/rate/max", "train/rate/q_proj"} <= kinds and len(kinds) == 3 + 9
        assert steps["train/rate/q_proj"] == [0, 2]
        values = {tag: reader.Scalars(tag)[0].value for tag in kinds}
        assert values["train/rate/min"] < values["train/rate/mean"] < values["train/rate/max"]
    else:
        assert not any("rate/" in tag for tag in steps)


def test_a_tracker_that_is_missing_is_one_line_before_training(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    assert main(["tune", *given, "method=full", "tune.report_to=tensorboard"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tune.report_to: TensorBoardCallback requires tensorboard" in said and not Path("adept_out").exists()
