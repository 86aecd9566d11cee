"""Marks that tests are held to. `gpu`: skipped, by name, without a CUDA device. `slow`: alone may start processes.

One thread: tiny tensors gain nothing from more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
quick: list[str] = []  # the test that runs, where it is not marked slow


def pytest_configure() -> None:
    sys.addaudithook(refuse_processes)


def refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    fonts = event == "subprocess.Popen" and "fc-list" in arguments[1]  # matplotlib's first look for fonts
    if quick and event in STARTS and not fonts:
        raise RuntimeError(f"{quick[0]} starts a process: mark it slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not any(map(item.get_closest_marker, ("slow", "nightly", "gpu"))):
        quick.append(item.nodeid)
    try:
        return (yield)
    finally:
        quick.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"{item.name} needs a CUDA device"))
