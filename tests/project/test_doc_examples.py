"""The examples of docs/ work: Python blocks run, commands and recipes are read without an error.

The blocks of a page run in order and share their names. They may use what examples in docstrings may use (test_docstring_examples.py)
and, in the current folder, the checkpoint MODEL and the text my.txt. A block after the line `<!-- not run: REASON -->` is only compiled.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import adept_fast
from adept_fast.cli.commands import COMMANDS
from adept_fast.data.items import load_items
from adept_fast.pipeline.recipe import Recipe, load
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^ {4}|`|-m )adept[-_]fast ([a-z]+)([^`\n]*)", re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """The blocks of a language: whether each runs, and its text."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(not reason, text) for reason, given, text in found if given == language]


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


@pytest.mark.slow
@named([page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "base"):
        tiny_models.checkpoint(tmp_path / name, num_hidden_layers=5)
    (tmp_path / "my.txt").write_text("\n\n".join(tiny_models.SENTENCES[:8]))
    probe = load_items("general", tiny_models.tokenizer())[:12]
    monkeypatch.setattr("adept_fast.data.items.load_items", lambda *given, **named: load_items(*given, **named)[:12])
    names: dict[str, Any] = {name: getattr(adept_fast, name) for name in adept_fast.__all__}
    names |= {"torch": torch, "model": tiny_models.model(), "tokenizer": tiny_models.tokenizer(), "probe": probe}
    for runs, text in blocks(page, "python"):
        code = compile(text, str(page), "exec")
        if runs:
            exec(code, names)


@named([page for page in PAGES if blocks(page, "yaml")])
def test_recipes_are_read(page: Path, tmp_path: Path) -> None:
    for number, (_, text) in enumerate(blocks(page, "yaml")):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(text)
        load(str(recipe), required=())


@named([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES])
def test_commands_are_read(page: Path) -> None:
    for name, rest in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        words = [word for word in shlex.split(rest, comments=True) if "..." not in word]
        if name == "copies":
            if not words or words[0].startswith("-") or words[0] == "ACTION":
                continue
            name = f"copies {words[0]}"
        assert name in COMMANDS or name == "help", f"adept-fast {name}"
        settings = [word for word in words if re.match(r"[a-z_.]+=", word)]
        if settings and name != "compare":
            own = {entry.name for kind in COMMANDS[name].declarations if kind is not Recipe for entry in fields(kind)}
            load(None, [setting for setting in settings if setting.partition("=")[0] not in own], required=())
