"""A bar on a terminal and in a notebook, which leave nothing behind; elsewhere news every half minute, without what moves a cursor."""

from __future__ import annotations

import logging
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from adept_fast.runtime.console import attached, bars
from adept_fast.runtime.progress import Progress
from tests.support.terminal import screen, terminal

logger = logging.getLogger("adept_fast.scoring.race")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as tqdm sees them: they pass where a test adds to them."""
    seconds = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def test_where_nobody_watches_there_is_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with attached(), Progress(total=200, desc="outer", unit="FLOP", unit_scale=True) as outer:
        for _ in Progress(range(10), desc="inner"):
            clock[0] += 12.5
        outer.update(50)
        clock[0] += 29
        outer.update(1)
    inner = ["inner: 30 % done, 01:27 left", "inner: 60 % done, 00:50 left", "inner: 90 % done, 00:12 left"]
    assert capsys.readouterr().err.splitlines() == [*inner, "outer: 25 % done, 06:15 left"]


def test_without_a_command_line_the_lines_are_news(
    clock: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def walk() -> None:
        for _ in Progress(range(3), desc="inner"):
            clock[0] += 40

    walk()
    assert not caplog.messages
    with caplog.at_level(logging.INFO):
        walk()
    assert caplog.messages == ["inner: 33 % done, 01:20 left", "inner: 67 % done, 00:40 left", "inner: 100 % done, 00:00 left"]
    assert capsys.readouterr() == ("", "")


def test_a_short_stage_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with attached():
        for _ in Progress(range(29)):
            clock[0] += 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_gets_one_bar_and_messages_above_it(clock: list[float], monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    with terminal(monkeypatch, columns) as shown, attached():
        with Progress(total=60, desc="tuning", unit="step") as outer:
            clock[0] += 20
            outer.update(20)
            assert [line[:12] for line in shown.screen()] == ["tuning:  33%"] and len(shown.screen()[0]) <= columns - 3
            with Progress(range(8), desc="general loss", unit="item") as inner:
                for _ in inner:
                    clock[0] += 1
            *above, last = shown.screen()
            assert above == [] and last.startswith("tuning:  33%")
            logger.info("step 20: general loss 1.953")
            first, last = shown.screen()
            assert first == "step 20: general loss 1.953" and last.startswith("tuning:  33%")
        logger.info("done")
        assert shown.screen() == ["step 20: general loss 1.953", "done", ""] and not bars
    assert "general loss: " in shown.text


def test_an_interrupted_terminal_ends_with_the_message(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 80) as shown, attached():
        with pytest.raises(KeyboardInterrupt), Progress(total=60, desc="tuning", unit="step") as bar:
            clock[0] += 20
            bar.update(20)
            print("^C", end="", file=sys.stderr, flush=True)  # the terminal's echo
            assert shown.screen()[0].endswith("^C")
            raise KeyboardInterrupt
        logger.error("interrupted; the same command goes on from here")
        assert shown.screen() == ["adept-fast: interrupted; the same command goes on from here", ""]


def test_the_screen_of_the_tests_shows_what_a_terminal_would() -> None:
    assert screen("twelve\rten\x1b[K\nabcdefgh", 6) == ["ten", "abcdef", "gh"]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_notebook_keeps_one_finished_bar() -> None:
    cell = """
from adept_fast import score_layers
from adept_fast.runtime import progress
from tests.support import tiny_models
progress.DELAY = 0
model = tiny_models.model()
score_layers(model, tiny_models.items(12))
print("scored")
with progress.Progress(range(2), desc="outer") as bar:
    for _ in bar:
        list(progress.Progress(range(5), desc="inner"))
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=120).execute()
    outputs = [output for output in notebook.cells[0].outputs if "TqdmWarning" not in output.get("text", "")]  # of transformers' import
    scored, printed, outer = outputs
    assert scored["output_type"] == "display_data" and scored["data"].keys() == {"text/plain"}
    assert scored["data"]["text/plain"].startswith("scoring, 12 of 12 items: 100%|")
    assert printed["text"] == "scored\n" and outer["data"]["text/plain"].startswith("outer: 100%|")


@pytest.mark.parametrize("watched", [True, False])
def test_silence_where_the_level_is_above_news_and_of_all_processes_but_the_first(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], watched: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    package = logging.getLogger("adept_fast")

    def shown(level: int, rank: str) -> str:
        monkeypatch.setenv("RANK", rank)
        with attached():
            package.setLevel(level)
            for _ in Progress(range(3)):
                clock[0] += 40
        return capsys.readouterr().err

    assert not shown(logging.WARNING, "0") and not shown(logging.INFO, "1") and shown(logging.INFO, "0")
    assert package.level == logging.NOTSET
