"""Docstrings of public names have an example, which runs and prints what it says, and name every argument.

An example may use every public name, `torch`, `model` (a causal language model of 4 layers), its `tokenizer`, `probe` (12 items) and, in
the current folder, the checkpoint `base`. "..." in its output stands for any text.
"""

from __future__ import annotations

import doctest
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import adept_fast
from adept_fast.data.items import Item, load_items
from tests.support import tiny_models


@cache
def probe() -> list[Item]:
    return load_items("general", tiny_models.tokenizer())[:12]


@pytest.mark.parametrize("name", adept_fast.__all__)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {public: getattr(adept_fast, public) for public in adept_fast.__all__} | {
        "torch": torch,
        "model": tiny_models.model(),
        "tokenizer": tiny_models.tokenizer(),
        "probe": probe(),
    }
    tiny_models.checkpoint(tmp_path / "base")
    found = doctest.DocTestFinder(exclude_empty=True).find(getattr(adept_fast, name), name, globs=given)
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    runner, report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), []
    for example in examples:
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", [name for name in adept_fast.__all__ if inspect.isfunction(getattr(adept_fast, name))])
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(adept_fast, name)
    arguments = [each.name for each in inspect.signature(function).parameters.values() if each.kind != each.VAR_KEYWORD]
    assert [argument for argument in arguments if not re.search(rf"\b{argument}\b", function.__doc__)] == []
