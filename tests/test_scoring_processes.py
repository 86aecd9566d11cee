"""Two processes score as one does, and `adept-fast score` killed in the middle goes on where it was."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import tiny_models
import torch

from adept_fast.importance import LayerScores, Race, score_layers

HERE = Path(__file__).parent


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, str(HERE / "scoring_worker.py"), str(tmp_path)]
    running = [subprocess.Popen(command, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    model, items = tiny_models.model(num_hidden_layers=6), tiny_models.items(40)
    alone = {
        "whole": score_layers(model, items, losses=("kl",), quiet=True),
        "raced": score_layers(model, items, race=Race(k=2, regret=0.3, first=8), quiet=True),
        "fisher": score_layers(model, items, "fisher", quiet=True),
    }
    for name, expected in alone.items():
        both = [LayerScores.load(tmp_path / f"{name}-{rank}.json") for rank in range(2)]
        assert both[0].profiles == both[1].profiles and both[0].certificate == both[1].certificate
        for loss, profile in expected.profiles.items():
            for key in ("values", "low", "high"):
                found, wanted = (torch.tensor(getattr(of, key)) for of in (both[0].profiles[loss], profile))
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert both and LayerScores.load(tmp_path / "raced-0.json").certificate["layers"] == alone["raced"].certificate["layers"]
    rows = [len((tmp_path / name).read_text().splitlines()) - 1 for name in ("journal", "journal.1")]
    assert min(rows) > 0, "one process measured everything"


def test_score_command_survives_a_kill(tmp_path: Path) -> None:
    tiny_models.checkpoint(tmp_path / "model", "qwen2")
    (tmp_path / "probe.txt").write_text("\n\n".join(tiny_models.SENTENCES))
    killer = """
import os, signal, sys
from adept_fast.importance import masking
left, measure = int(sys.argv[1]), masking.measure
def counted(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*given)
masking.measure = counted
from adept_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""
    settings = [
        f"model_name_or_path={tmp_path / 'model'}",
        f"probe={tmp_path / 'probe.txt'}",
        "score.regret=0.05",
        "score.loss=all",
        "expand.k=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}

    def score(output: str, calls: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", killer, str(calls), "score", *settings, f"output_dir={tmp_path / output}"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert score("killed", 3).returncode == -9
    kept = len((tmp_path / "killed" / ".scores.journal").read_text().splitlines()) - 1
    assert kept == 3
    for output in ("killed", "whole"):
        done = score(output, 10_000)
        assert done.returncode == 0, done.stderr
        assert "nats per token more than the best 2, at 95% confidence" in done.stdout
    results = [json.loads((tmp_path / output / "scores.json").read_text()) for output in ("killed", "whole")]
    assert all(result.pop("seconds") > 0 for result in results) and results[0] == results[1]
    assert (tmp_path / "killed" / "scores.png").is_file() and not (tmp_path / "killed" / ".scores.journal").exists()
