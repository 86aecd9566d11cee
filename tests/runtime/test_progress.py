"""A bar on a terminal; elsewhere a line every half minute, without what moves a cursor."""

from __future__ import annotations

import sys

import pytest

from adept_fast.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as tqdm sees them: they pass where a test adds to them."""
    seconds = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def test_where_nobody_watches_there_is_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=200, desc="outer", unit="FLOP", unit_scale=True) as outer:
        for _ in Progress(range(10), desc="inner"):
            clock[0] += 12.5
        outer.update(50)
        clock[0] += 29
        outer.update(1)
    inner = ["inner: 30 % done, 01:27 left", "inner: 60 % done, 00:50 left", "inner: 90 % done, 00:12 left"]
    assert capsys.readouterr().err.splitlines() == [*inner, "outer: 25 % done, 06:15 left"]


def test_a_short_stage_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Progress(range(29)):
        clock[0] += 1
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(Progress(range(3), desc="inner"))
    assert "\rinner: 100%|" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_silence_where_it_is_asked_for_and_of_all_processes_but_the_first(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    def walk(quiet: bool) -> None:
        for _ in Progress(range(3), quiet=quiet):
            clock[0] += 40

    walk(True)
    monkeypatch.setenv("RANK", "1")
    walk(False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    walk(False)
    assert capsys.readouterr().err
