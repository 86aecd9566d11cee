"""A bar on a terminal; elsewhere news every half minute, without what moves a cursor."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from adept_fast.runtime.console import attached
from adept_fast.runtime.progress import Progress


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


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(Progress(range(3), desc="inner"))
    assert "\rinner: 100%|" in capsys.readouterr().err


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", cell)
    list(Progress(range(3), desc="inner"))
    assert "\rinner: 100%|" in cell.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_silence_where_the_level_is_above_news_and_of_all_processes_but_the_first(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
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
