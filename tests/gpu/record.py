"""Plugin of pytest for `python -m tests.gpu`: records each test as it begins and ends, and leaves out those that are recorded."""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True)
    parser.addoption("--each", type=float, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Record(config.getoption("--record"), config.getoption("--each")))


def usable() -> bool:
    """Return whether this process can still use its GPU."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Record:
    def __init__(self, file: Path, each: float) -> None:
        self.file, self.each, self.left = file, each, 0
        self.tests: dict[str, dict[str, Any]] = json.loads(file.read_text())["tests"] if file.exists() else {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        session.items[:] = [item for item in session.items if item.nodeid not in self.tests]
        self.left = len(session.items)
        self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.left -= 1
        self._note(item.nodeid, "unfinished", 0.0, f"its process ended in it, or it took more than {self.each:g} s")
        faulthandler.dump_traceback_later(self.each, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            test = self.tests[item.nodeid]
            if test["outcome"] != "skipped" and not usable():
                self._note(item.nodeid, "failed", test["seconds"], f"left the GPU unusable. {test['message']}")
                item.session.shouldstop = "the GPU is unusable in this process"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self.tests[report.nodeid]["outcome"]
        if report.when == "call" or (report.outcome != "passed" and before != "failed"):
            message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
            self._note(report.nodeid, report.outcome, report.duration, message)

    def _note(self, test: str, outcome: str, seconds: float, message: str) -> None:
        self.tests[test] = {"outcome": outcome, "seconds": round(seconds, 3), "message": message}
        self._write()

    def _write(self) -> None:
        self.file.write_text(json.dumps({"left": self.left, "tests": self.tests}))
