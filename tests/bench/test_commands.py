"""Every benchmark can be imported, and says what it measures and what each of its options is."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from bench.__main__ import NAMES, main

ROOT = Path(__file__).parents[2]
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == NAMES and {"adamw", "scoring", "tune"} < {*NAMES}
    assert main(["none"]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It explains each option, and has those that the documents name."""
    module = import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: python -m bench {name} " in said and module.__doc__.strip() in said
    options = said.partition("options:")[2].split("\n  --")
    assert all(len(option.split()) > 2 for option in options[1:]), options
    named = {option for call in re.findall(rf"python -m bench {name}\b([^`\n]*)", PAGES) for option in re.findall(r"--[a-z-]+", call)}
    assert all(f" {option} " in said for option in named - {"--save"}), named
