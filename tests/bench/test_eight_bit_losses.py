"""The benchmark of 8-bit moments measures every run at each point, sees that frozen rows keep their bits, and repeats no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.eight_bit import POINTS, main


@pytest.mark.slow
def test_runs_are_compared_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{number} times {number} is {number * number}. " * 9}) + "\n" for number in range(40)))
    options = ["--text", str(text), "--out", str(tmp_path / "runs"), "--seeds=1", "--steps=8", "--batch=2", "--length=32", "--held-out=4"]
    found = main(options)
    assert found["cells"] == 6 and capsys.readouterr().err.count("min left") == 6 * POINTS
    for states in ("fp32", "int8", "control"):
        one, units = (found[rates][states]["0"] for rates in ("one", "units"))
        assert len(one["losses"]) == POINTS and one["losses"][-1] < one["losses"][0] and one["losses"] != units["losses"]
        assert units["frozen_unchanged"] == 1 and units["frozen_rows"] > 500 and units["other_unchanged"] < 0.5
    assert found["one"]["int8_minus_fp32"]["0"][-1] != 0 and found["one"]["spread_of_fp32"] is None
    (tmp_path / "runs").rename(tmp_path / "kept")
    assert main([*options[:3], str(tmp_path / "kept"), *options[4:], "--seconds=0"]) == found
    assert not capsys.readouterr().err
