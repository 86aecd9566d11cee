"""--help of a stage lists every key of the recipe that the stage reads."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.help import groups
from adept_fast.cli.main import main
from adept_fast.pipeline import recipe
from tests.support import tiny_models

WHOLE = ("as_dict", "check_together", "_build", "load")  # functions that read every key, for files and checks
SETTINGS = (
    *("model_name_or_path=model", "output_dir=out", "probe=probe.jsonl", "domain=domain.txt"),
    *("tune.max_steps=2", "score.domain_items=2"),
)
STAGES = ("score", "expand", "verify", "tune", "eval", "report")


@pytest.mark.slow
def test_a_stage_reads_no_key_that_its_help_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model")
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps({"text": f"The fox counts {number} stones"}) + "\n" for number in range(9)))
    (tmp_path / "domain.txt").write_text("\n\n".join(tiny_models.SENTENCES))
    read: set[str] = set()

    def tracked(cls: type, prefix: str) -> None:
        names = {each.name for each in fields(cls)}

        def get(self: Any, name: str) -> Any:
            if name in names:
                frame, callers = sys._getframe(1), set()
                while frame:
                    callers.add(frame.f_code.co_name)
                    frame = frame.f_back
                if not callers & {*WHOLE}:
                    read.add(prefix + name)
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", get, raising=False)

    default = recipe.Recipe()
    tracked(recipe.Recipe, "")
    for table in ("score", "expand", "tune", "eval"):
        tracked(type(object.__getattribute__(default, table)), f"{table}.")
    left_out = {}
    for name in STAGES:
        read.clear()
        assert main([name, *SETTINGS]) == 0
        listed = {key.name for _, keys in groups(COMMANDS[name]) for key in keys}
        left_out[name] = sorted(key for key in read - listed if key not in ("score", "expand", "tune", "eval", "tune.training"))
    assert not any(left_out.values()), left_out
