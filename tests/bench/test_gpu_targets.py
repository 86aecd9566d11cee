"""`make gpu` goes on after whatever fails, and writes down what happened: with tests that break things, and with stand-ins for tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import os, time, pytest
from tests.gpu import record

def test_first(): pass
def test_fails(): assert 1 == 2
def test_breaks(): record.usable = lambda: False
def test_skipped(): pytest.skip("no second device")
def test_crashes(): os.abort()
def test_hangs(): time.sleep(100)
@pytest.fixture
def broken(): raise RuntimeError("in a fixture")
def test_set_up(broken): pass
def test_last(): pass
"""
OUTCOMES = {
    "first": "passed",
    "fails": "failed",
    "breaks": "failed",
    "skipped": "skipped",
    "crashes": "unfinished",
    "hangs": "unfinished",
    "set_up": "failed",
    "last": "passed",
}


@pytest.mark.slow
def test_every_test_is_run_whatever_the_ones_before_it_do(tmp_path: Path) -> None:
    (tmp_path / "test_gpu.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.gpu", str(tmp_path / "out" / "check.json"), "--each=1", "--"]
    command += ["-c", os.devnull, f"--rootdir={tmp_path}", str(tmp_path)]
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert {name.partition("::test_")[2]: test["outcome"] for name, test in found["tests"].items()} == OUTCOMES
    assert found["counts"] == {"passed": 2, "failed": 3, "skipped": 1, "unfinished": 2} and found["left"] == 0
    messages = {name.partition("::test_")[2]: test["message"] for name, test in found["tests"].items()}
    assert "assert 1 == 2" in messages["fails"] and "unusable" in messages["breaks"] and "no second device" in messages["skipped"]
    assert "in a fixture" in messages["set_up"] and "test_crashes" in found["output"] and len(found["exits"]) == 4
    assert done.returncode == 1 and done.stdout.endswith("3 failed, 2 passed, 1 skipped, 2 unfinished, 0 not run\n")


BENCHES = ["adamw", "gradient_sums", "linear_cross_entropy", "scoring"]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_each_part_goes_on_and_names_what_failed(tmp_path: Path) -> None:
    """The interpreter is a stand-in that fails for some benchmarks and for one tool of the sanitizer."""
    for stamp in (".torch", ".test"):
        (tmp_path / stamp).touch()
    log = tmp_path / "log"
    run = program(tmp_path / "run", f'echo "$@" >> {log}; case "$*" in *"bench adamw"*|*scoring*|*memcheck*) exit 3;; esac; echo "{{}}"')
    out = tmp_path / "out"
    given = {"VENV": tmp_path, "RUN": run, "OUT": out, "GPU_SECONDS": 60}
    command = ["make", "--no-print-directory", "gpu", *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    called = log.read_text().splitlines()
    assert [line.split()[2] for line in called if line.startswith("-m bench")] == BENCHES
    assert "--seconds=20 --save" in called[0] and all("--save" in line for line in called[:4])
    files = [line.split()[2] for line in called[4:]]
    assert files == [f"{out}/check.json", f"{out}/memcheck.json", f"{out}/racecheck.json"]
    assert "--seconds=60 -- -m gpu" in called[4] and "tests/gpu/test_adamw_cuda_gpu.py" in called[4]
    assert "--seconds=30 --under compute-sanitizer --tool memcheck --kernel-name kns=adept_fast" in called[5]
    assert {path.name for path in out.iterdir()} == {f"{name}.json" for name in BENCHES}
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed:")]
    assert failed == ["failed: adamw scoring", "failed: memcheck", "failed: gpu-bench gpu-sanitize"] and done.returncode != 0
