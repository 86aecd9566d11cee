"""Each example runs offline, as it stands, on its tiny defaults. plain_loop.py is in tests/tuning/test_other_trainers.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_score_and_plot(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "score_and_plot.py")
    table = (here / "scored/layers.csv").read_text().splitlines()
    assert table[0] == "layer,answer,answer_low,answer_high,chosen" and len(table) == 7
    assert sum(line.endswith("True") for line in table) == 2
    assert (here / "scored/layers.png").read_bytes().startswith(b"\x89PNG")


def test_adapt_and_compare(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "adapt_and_compare.py")
    assert not ended.value.code and (here / "compared/compare.html").is_file()
    for method in ("adept", "lora", "full"):
        measured = json.loads((here / f"compared/{method}/eval.json").read_text())["models"]
        assert measured["tuned"]["domain"]["loss"] < measured["base"]["domain"]["loss"], method


def test_vision(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "vision.py")
    said = capsys.readouterr().out
    right = float(said.partition("right answers: ")[2].partition("%")[0])
    assert right > 90 and "resumed run ends in the same bits: True" in said and "step 60: loss" in said


def test_vision_of_given_images(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw = numpy.random.default_rng(0)
    numpy.savez("images.npz", x_train=draw.integers(0, 256, (40, 8, 8, 3), dtype=numpy.uint8), y_train=numpy.arange(40) % 3)
    run(monkeypatch, "vision.py", "images.npz", "10")
    assert "same bits: True" in capsys.readouterr().out
