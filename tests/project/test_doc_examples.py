"""The examples of docs/ work: Python blocks run, commands and recipes are read without an error.

The blocks of a page run in order and share their names. They may use what examples in docstrings may use (test_docstring_examples.py)
and, in the current folder, the checkpoint MODEL and the text my.txt. A block after the line `<!-- not run: REASON -->` is only compiled.
A block after `<!-- alone -->` is a whole script for the optimizer: it shares nothing, must step and have a unit rate, and is skipped where
a package that it imports is missing. `<!-- alone: COMMAND -->` starts it in the processes of COMMAND.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import adept_fast
from adept_fast.cli.commands import COMMANDS
from adept_fast.data.items import load_items
from adept_fast.pipeline.recipe import Recipe, load
from tests.support import tiny_models
from tests.support.assert_stepped import assert_stepped

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^(<!-- (?:not run: |alone)[^\n]* -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ALONE = re.compile(r"^<!-- alone(?:: ([^\n]+))? -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^ {4}|`|-m )adept[-_]fast ([a-z]+)([^`\n]*)", re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """The blocks of a language: whether each runs, and its text."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(not reason, text) for reason, given, text in found if given == language]


def scripts() -> list[Any]:
    """The blocks that are whole scripts: the command that starts each, and its text. Named by the headings above them."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in ALONE.finditer(text):
            heading = re.findall(r"^#+ (.+)$", text[: block.start()], re.MULTILINE)[-1]
            found.append(pytest.param(block[1], block[2], id=f"{page.stem}: {heading}"))
    return found


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def make_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("MODEL", "base"):
        tiny_models.checkpoint(folder / name, num_hidden_layers=5)
    (folder / "my.txt").write_text("\n\n".join(tiny_models.SENTENCES[:8]))


@pytest.mark.slow
@named([page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, monkeypatch)
    probe = load_items("general", tiny_models.tokenizer())[:12]
    monkeypatch.setattr("adept_fast.data.items.load_items", lambda *given, **named: load_items(*given, **named)[:12])
    names: dict[str, Any] = {name: getattr(adept_fast, name) for name in adept_fast.__all__}
    names |= {"torch": torch, "model": tiny_models.model(), "tokenizer": tiny_models.tokenizer(), "probe": probe}
    for runs, text in blocks(page, "python"):
        code = compile(text, str(page), "exec")
        if runs:
            exec(code, names)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "text"), scripts())
def test_scripts_run_as_pasted(command: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    for package in sorted({(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in imports}):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    make_files(tmp_path, monkeypatch)
    if command is None:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, "script", "exec"), names)
        assert_stepped(names)
    else:
        Path("train.py").write_text(f"{text}\nfrom tests.support.assert_stepped import assert_stepped\nassert_stepped(globals())\n")
        run = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1).split(" ")
        given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*run, "train.py"], env=given, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


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
