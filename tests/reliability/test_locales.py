"""A run with names and texts beyond ASCII, in a Turkish locale and in C with everything that Python does to mend it switched off."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.attempts import Attempts

pytestmark = pytest.mark.slow

FOLDER = "Göl \N{LATIN SMALL LETTER DOTLESS I}\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"


def turkish(folder: Path) -> dict[str, str]:
    if shutil.which("localedef") is None:
        pytest.skip("localedef, which makes the Turkish locale, is not installed")
    made = subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "tr_TR.UTF-8")], capture_output=True, text=True)
    if not (folder / "tr_TR.UTF-8").is_dir():
        pytest.skip(f"the Turkish locale cannot be made: {made.stderr}")
    return {"LOCPATH": str(folder), "LC_ALL": "tr_TR.UTF-8"}


@pytest.mark.nightly
@pytest.mark.parametrize("locale", ["tr_TR", "C"])
def test_a_run_in_another_locale(tmp_path: Path, locale: str) -> None:
    settings = turkish(tmp_path) if locale == "tr_TR" else {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    here = tmp_path / FOLDER if locale == "tr_TR" else tmp_path
    here.mkdir(exist_ok=True)
    tiny_models.checkpoint(here / "MODEL", "qwen2", max_position_embeddings=512)
    rows = [{"text": f"{sentence} İstanbul'da ıssız {number}."} for number, sentence in enumerate(tiny_models.SENTENCES)]
    (here / "notes.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    command = ["run", f"model_name_or_path={here / 'MODEL'}", f"domain={here / 'notes.jsonl'}", f"output_dir={here / 'out'}", "expand.k=1"]
    command += ["score.max_items=6", "tune.max_steps=1", "tune.max_items=9", "eval.max_items=9", "tune.block_size=64", "method=ADEPT"]
    with Attempts({**settings, "ADEPT_FAST_CACHE": str(tmp_path / "cache")}) as attempts:
        code, said = attempts.run(command, tmp_path / "said")
        assert code == 2 and "method must be one of" in said.splitlines()[-1], said
        code, said = attempts.run(command[:-1], tmp_path / "said")
    assert code == 0, said
    assert json.loads((here / "out" / "eval.json").read_text(encoding="utf-8"))["models"]["tuned"]["domain"]["items"] >= 1
    assert "İstanbul" in rows[0]["text"] and (here / "out" / "report.html").is_file()
