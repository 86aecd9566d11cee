"""Two processes score as one does, and `adept-fast score` killed in the middle goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adept_fast import mask_units
from adept_fast.cli.main import main
from adept_fast.scoring.race import Race
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.scores import LayerScores, UnitScores
from adept_fast.scoring.settings import CHEAP
from tests.support import tiny_models
from tests.support.attempts import Attempts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "scoring_worker.py"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a score with all that can be scored."""
    folder = tmp_path_factory.mktemp("scored")
    tiny_models.checkpoint(folder / "model", "qwen2")
    (folder / "probe.txt").write_text("\n\n".join(tiny_models.SENTENCES))
    (folder / "domain.txt").write_text("\n\n".join(f"Of {sentence}" for sentence in tiny_models.SENTENCES))
    given = {"model_name_or_path": folder / "model", "probe": folder / "probe.txt", "domain": folder / "domain.txt", "expand.k": 2}
    given |= {"score.domain_items": 9, "score.compare": f"[{', '.join(CHEAP)}]", "score.units": "head", "score.unit_layers": "[0, 2]"}
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def on_two(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """What two processes left in a folder, and how they ended."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder), *settings], env=environment, capture_output=True, text=True, timeout=240)
    assert (folder / "done-1.json").exists(), done.stderr
    return folder, done


def assert_same(found: Any, wanted: Any) -> None:
    """JSON of two processes and of one: the same, numbers to 1e-5, times aside."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"seconds"}:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5) if isinstance(wanted, float) else found == wanted


def test_two_processes_give_what_one_gives(on_two: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, _ = on_two
    model, items = tiny_models.model(num_hidden_layers=6), tiny_models.items(40)
    alone = {
        "whole": score_layers(model, items, losses=("kl",)),
        "raced": score_layers(model, items, race=Race(k=2, regret=0.3, first=8)),
        "fisher": score_layers(model, items, "fisher"),
        "units": mask_units(model, items, "head", layers=[1, 4]),
    }
    for name, expected in alone.items():
        both = [type(expected).load(folder / f"{name}-{rank}.json") for rank in range(2)]
        assert both[0].profiles == both[1].profiles
        for loss, profile in expected.profiles.items():
            for key in ("values", "low", "high"):
                found, wanted = (torch.tensor(getattr(of, key)) for of in (both[0].profiles[loss], profile))
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    raced = [LayerScores.load(folder / f"raced-{rank}.json").certificate for rank in range(2)]
    assert raced[0] == raced[1] and raced[0]["layers"] == alone["raced"].certificate["layers"]
    for journal in ("journal", "units"):
        rows = [len((folder / name).read_text().splitlines()) - 1 for name in (journal, f"{journal}.1")]
        assert min(rows) > 0, "one process measured everything"


def test_score_of_two_processes_writes_what_one_writes(
    on_two: tuple[Path, subprocess.CompletedProcess], settings: list[str], tmp_path: Path
) -> None:
    folder, done = on_two
    assert main(["score", *settings, f"output_dir={tmp_path / 'one'}"]) == 0
    names = [sorted(path.name for path in place.iterdir()) for place in (tmp_path / "one", folder / "two")]
    assert names[0] == names[1] and sum(name.endswith(".json") for name in names[0]) == 2 + len(CHEAP)
    for path in (tmp_path / "one").glob("*.json"):
        assert_same(*(json.loads((place / path.name).read_text()) for place in (folder / "two", tmp_path / "one")))
    assert UnitScores.load(folder / "two" / "unit_scores.json").per_item and done.stdout.count("masking 20 units") == 1


def test_one_of_two_processes_writes(on_two: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, done = on_two
    first, again = ([json.loads((folder / f"done-{rank}.json").read_text())[turn] for rank in range(2)] for turn in range(2))
    assert [each["code"] for each in (*first, *again)] == [0] * 4
    journals = {".scores.journal.1", ".scores.journal.domain.1", ".unit_scores.journal.1"}
    assert {name for name in first[1]["written"] if not name.startswith(".adept_fast-")} == journals
    assert again[1]["written"] == [] and {"scores.png", "unit_scores.png"} <= set(again[0]["written"])
    assert done.stdout.count("up to date") == 2 + len(CHEAP) and done.stdout.count("chosen layers") == 2


def test_error_of_one_process_ends_all(on_two: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, done = on_two
    told = [line for line in done.stderr.splitlines() if line.startswith("adept-fast:")]
    assert done.returncode == 1 and told[0] == "adept-fast: process 1: RuntimeError: out of memory (--debug shows where)"
    assert not (folder / "failed" / "scores.json").exists()


@pytest.mark.nightly
def test_score_command_survives_a_kill(settings: list[str], tmp_path: Path) -> None:
    given = [*settings, "score.regret=0.05", "score.loss=all", "score.compare=[gate]", "score.units=null", "score.unit_layers=null"]
    with Attempts({"PYTHONPATH": str(ROOT)}) as attempts:

        def score(output: str, **kill: Any) -> tuple[int, str]:
            return attempts.run(["score", *given, f"output_dir={tmp_path / output}"], tmp_path / "said", **kill)

        assert score("killed", place="adept_fast.scoring.layer_masking:LayerMasks.measure", calls=3)[0] == -9
        kept = len((tmp_path / "killed" / ".scores.journal").read_text().splitlines()) - 1
        assert kept == 3
        for output in ("killed", "whole"):
            code, said = score(output)
            assert code == 0 and "nats per token more than the best 2, at 95% confidence" in said, said
    results = [json.loads((tmp_path / output / "scores.json").read_text()) for output in ("killed", "whole")]
    assert all(result.pop("seconds") > 0 for result in results) and results[0] == results[1]
    assert results[0]["analysis"].keys() == {"stability", "conflicts", "comparison"}
    assert (tmp_path / "killed" / "scores.png").is_file() and not (tmp_path / "killed" / ".scores.journal").exists()
