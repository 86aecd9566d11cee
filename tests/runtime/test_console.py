"""Who sees what of the logger "adept_fast": a library user, the command line, a log file, and processes that do not lead."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adept_fast
from adept_fast.runtime.console import LAST, attached

PACKAGE, MODULE = logging.getLogger("adept_fast"), logging.getLogger("adept_fast.scoring.race")
SCRIPT = """
import logging, sys
if sys.argv[1:]:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
from adept_fast.data.items import load_items
from adept_fast.runtime import progress
progress.INTERVAL = 0
for _ in progress.Progress(range(1), desc="walk"):
    load_items([{"text": "", "id": 1}, {"input_ids": [1, 2]}])
"""


def speak() -> None:
    MODULE.debug("details")
    MODULE.info("news")
    MODULE.warning("a warning")
    MODULE.error("a failure")


@pytest.mark.slow
@pytest.mark.parametrize("configured", [False, True])
def test_a_script_is_told_warnings_alone_until_it_configures_logging(configured: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *["configured"] * configured], capture_output=True, text=True, check=True)
    warning = "probe: left out: 1 empty"
    if not configured:
        assert done.stdout == "" and done.stderr.splitlines() == [warning]
        return
    news = "INFO adept_fast.runtime.progress: walk:"
    lines = [f"{news} 0 % done, ? left", f"WARNING adept_fast.data.items: {warning}", f"{news} 100 % done, 00:00 left"]
    assert done.stderr == "" and done.stdout.splitlines() == lines


def test_the_command_line_prints_bare_lines_and_leaves_nothing_attached(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with attached():
        speak()
    assert capsys.readouterr() == ("news\na warning\n", "adept-fast: a failure\n") and not caplog.records
    speak()
    assert capsys.readouterr() == ("", "") and PACKAGE.level == logging.NOTSET and PACKAGE.propagate and not PACKAGE.handlers


def test_a_process_that_does_not_lead_reports_errors_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with attached():
        speak()
    assert capsys.readouterr() == ("", "adept-fast: process 1: a failure\n")


@pytest.mark.parametrize("inside", [False, True])
def test_a_log_file_gets_all_of_it(tmp_path: Path, inside: bool) -> None:
    file = logging.FileHandler(tmp_path / "run.log")
    PACKAGE.addHandler(file)
    try:
        if inside:
            with attached():
                speak()
        else:
            PACKAGE.setLevel(logging.INFO)
            speak()
    finally:
        PACKAGE.removeHandler(file)
        PACKAGE.setLevel(logging.NOTSET)
        file.close()
    assert (tmp_path / "run.log").read_text().splitlines() == ["news", "a warning", "a failure"]


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with attached():
        MODULE.info("\N{GREEK SMALL LETTER ALPHA} = 1")
    assert written.getvalue() == b"\\u03b1 = 1\n"


def test_a_full_stdout_is_given_up_and_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, attached():
        monkeypatch.setattr(sys, "stdout", full)
        MODULE.info("one")
        MODULE.info("two")
        assert capsys.readouterr().err == "adept-fast: stdout cannot be written to (No space left on device): going on without it\n"
        monkeypatch.undo()


@pytest.mark.parametrize(("last", "said"), [(LAST, ""), ({}, "adept-fast: stdout cannot be written to (Broken pipe)")])
def test_a_reader_who_stops_is_a_fault_only_while_work_goes_on(
    last: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, attached():
        monkeypatch.setattr(sys, "stdout", closed)
        MODULE.info("one", extra=last)
        assert capsys.readouterr().err.partition(": going on")[0] == said
        monkeypatch.undo()


def test_only_the_console_prints() -> None:
    root = Path(adept_fast.__file__).parent
    calls = {
        (path.relative_to(root).as_posix(), ast.unparse(node.func))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    printing = ("print", "warnings.warn", "sys.stdout.write", "sys.stderr.write")
    assert {path for path, called in calls if called in printing} == {"runtime/console.py"}
