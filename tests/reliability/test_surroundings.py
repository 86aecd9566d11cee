"""What surrounds a run may fail it: its streams, signals, limits, locale and clock. Nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.stages import Stage, Stages

HERE = "tests.reliability.test_surroundings"

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with Stages(tmp_path_factory.mktemp("stages")) as made:
        yield made


def disturbed(stages: Stages, name: str, function: str, **more: object) -> tuple[Stage, int, str]:
    stage = stages.all[name]
    stages.begin(stage)
    code, said = stages.run(stage.commands[0], before=f"{HERE}:{function}", **more)
    return stage, code, said


def close_stdout(_: dict) -> None:
    os.close(1)
    sys.stdout = None  # as Python starts without it


def close_all(_: dict) -> None:
    for descriptor in range(3):
        os.close(descriptor)
    sys.stdin = sys.stdout = sys.stderr = None


def break_stdout(_: dict) -> None:
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)


def fill_stdout(_: dict) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def break_both(_: dict) -> None:
    from adept_fast.runtime import progress

    progress.INTERVAL = 0  # bars say something, too
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(reading)


def ascii_stdout(_: dict) -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    import builtins

    from adept_fast.cli import main

    run = main._run

    def wordy(*given: object) -> None:
        main.logger.info("\N{GREEK SMALL LETTER ALPHA} of f\N{LATIN SMALL LETTER DOTLESS I}x")
        run(*given)

    assert builtins.print is print
    main._run = wordy


def few_files(request: dict) -> None:
    limit = request["limit"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def set_clock_back(_: dict) -> None:
    """Each look at the clock is an hour before the last one."""
    seconds = [time.time()]

    def back() -> float:
        seconds[0] -= 3600
        return seconds[0]

    time.time = back


@pytest.mark.parametrize("how", ["close_stdout", "close_all", "break_stdout", "fill_stdout", "break_both", "ascii_stdout"])
def test_nobody_need_read_along(stages: Stages, how: str) -> None:
    stage, code, said = disturbed(stages, "expand", how)
    assert code == 0 and "Traceback" not in said, said
    reasons = {"break_stdout": "Broken pipe", "fill_stdout": "No space left on device"}
    lines = [line for line in said.splitlines() if line.startswith("adept-fast: ")]
    assert lines == [f"adept-fast: stdout cannot be written to ({reasons.get(how)}): going on without it"] * (how in reasons)
    assert ("\\u03b1 of f\\u0131x" in said) == (how == "ascii_stdout")
    assert stages.finish(stage) is None


@pytest.mark.parametrize("limit", [12, 16, 20, 28])
def test_too_few_open_files_is_one_line_with_the_way_out(stages: Stages, limit: int) -> None:
    stage, code, said = disturbed(stages, "expand", "few_files", limit=limit)
    assert code in (0, 1) and "Traceback" not in said, said
    if code:
        line = said.splitlines()[-1]
        assert line.startswith("adept-fast: ") and "Too many open files" in line and "ulimit -n" in line, said
    assert stages.torn(stage) == [] and stages.finish(stage) is None


@pytest.mark.parametrize("name", ["tune", "score"])
def test_a_clock_that_goes_back_changes_nothing(stages: Stages, name: str) -> None:
    stage, code, said = disturbed(stages, name, "set_clock_back")
    assert code == 0, said
    assert stages.finish(stage) is None


def test_of_checkpoints_with_times_in_the_future_the_last_ones_stay(stages: Stages) -> None:
    stage = stages.all["tune"]
    stages.begin(stage)
    command = (*stage.commands[0], "tune.save_total_limit=1")
    code, said = stages.run(command, place="adept_fast.tuning.staged_trainer:save_file", calls=1)
    checkpoints = stages.out / "checkpoints"
    assert code == -9 and [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"], said
    os.utime(checkpoints / "checkpoint-2", (2**33, 2**33))
    code, said = stages.run(command, place="adept_fast.tuning.staged_trainer:save_file", calls=1)
    assert code == -9 and "resuming from checkpoint-2" in said
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "tune"), (signal.SIGHUP, "tune"), (signal.SIGINT, "tune"), (signal.SIGTERM, "copies")]
)
def test_a_signal_stops_in_one_line_and_leaves_nothing_half_written(stages: Stages, number: int, name: str) -> None:
    place = {"tune": "adept_fast.tuning.staged_trainer:save_file", "copies": "adept_fast.expansion.edit_checkpoint:prove_bytes"}[name]
    stage, code, said = disturbed(stages, name, "send_in", send=int(number), at=place)
    assert code == 128 + number, said
    how = {signal.SIGINT: "interrupted"}.get(number, f"stopped by {signal.Signals(number).name}")
    kept = "nothing was written" if name == "copies" else "the same command goes on from here"
    assert said.splitlines()[-1] == f"adept-fast: {how}; {kept}"
    assert not [*stages.out.rglob(".adept_fast-*")] and not (stages.out / ".lock").exists()
    if name == "tune":
        code, said = stages.run(stage.commands[0])
        assert code == 0 and "resuming from checkpoint-2" in said
    assert stages.finish(stage) is None


def send_in(request: dict) -> None:
    """A signal in the midst of writing: at the second checkpoint, or the first proof."""
    from tests.support.attempts import found

    # Whoever starts the tests in the background or under nohup has them ignored.
    signal.signal(request["send"], signal.default_int_handler if request["send"] == signal.SIGINT else signal.SIG_DFL)
    holder, name = found(request["at"])
    original, left = getattr(holder, name), [int(name == "save_file")]

    def sending(*given: object, **named: object) -> object:
        result = original(*given, **named)
        if not left[0]:
            os.kill(os.getpid(), request["send"])
        left[0] -= 1
        return result

    setattr(holder, name, sending)


def test_a_second_run_in_the_same_output_dir_is_refused_and_harms_nothing(stages: Stages) -> None:
    stage = stages.all["expand"]
    stages.begin(stage)
    os.mkfifo(stages.folder / "gate")
    ended: list[tuple[int, str]] = []
    waiting = {"before": f"{HERE}:wait_at_the_gate", "gate": str(stages.folder / "gate")}
    first = threading.Thread(target=lambda: ended.append(stages.run(stage.commands[0], **waiting)))
    first.start()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))}
    gate = os.open(stages.folder / "gate", os.O_WRONLY)  # opens when the first has reached it
    second = subprocess.run([sys.executable, "-m", "adept_fast", *stage.commands[0]], capture_output=True, text=True, env=environment)
    os.close(gate)
    first.join()
    assert second.returncode == 2 and second.stderr.splitlines()[-1].endswith("another run is working in this output_dir"), second.stderr
    assert ended[0][0] == 0, ended
    assert stages.finish(stage) is None


def wait_at_the_gate(request: dict) -> None:
    from adept_fast.pipeline.run import STAGES

    expand = STAGES["expand"]

    def waiting(work: object) -> object:
        with open(request["gate"], "rb") as gate:
            gate.read()
        return expand(work)

    STAGES["expand"] = waiting


@pytest.mark.parametrize(
    ("name", "at"), [("score", "adept_fast.pipeline.score:score_layers"), ("tune", "adept_fast.tuning.adept_callback:apply_rates")]
)
def test_an_output_dir_that_is_removed_while_it_works_is_told_or_made_again(stages: Stages, name: str, at: str) -> None:
    stage, code, said = disturbed(stages, name, "remove_in", at=at, out=str(stages.out))
    assert code in (0, 1) and "Traceback" not in said, said
    if code:
        assert str(stages.out) in said.splitlines()[-1] and "was removed in the meantime" in said.splitlines()[-1], said
    found = stages.out.exists() and {path.name for path in stages.out.rglob("*") if path.is_file()}
    shutil.rmtree(stages.out, ignore_errors=True)
    stages.begin(stage)
    assert stages.finish(stage) is None and (code or found), found


def remove_in(request: dict) -> None:
    from tests.support.attempts import found

    holder, name = found(request["at"])
    original = getattr(holder, name)

    def removing(*given: object, **named: object) -> object:
        result = original(*given, **named)
        shutil.rmtree(request["out"], ignore_errors=True)
        return result

    setattr(holder, name, removing)
