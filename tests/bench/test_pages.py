"""The pages quote the figures of stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import adamw_pages
from bench.adamw_others import OTHERS

STORED = json.loads(adamw_pages.STORED.read_text())
PAGES = adamw_pages.written(STORED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_of_adamw_are_those_of_its_result(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run python -m bench.adamw_pages"


def test_other_figures_change_the_pages() -> None:
    stored: dict[str, Any] = json.loads(json.dumps(STORED))
    bf16 = stored["result"]["bf16"]
    bf16["ours"] |= {"ms": 1234.4, "state_bytes": 4.0, "python_calls": 251, "distance": 0.0164, "spread": 0.02}
    bf16["torchao"] = {"ms": 4321.0, "state_bytes": 4.03, "python_calls": 170599, "distance": 0.0164, "spread": 0.0175}
    bf16["ratios"]["columns/ours"] = 1.26
    stored["result"]["packages"]["torchao"] = "0.18.0"
    stored["machine"]["date"] = "2030-01-02T03:04:05+00:00"
    made = adamw_pages.written(stored)
    assert "| 1234 ms; with 465 units " in made[adamw_pages.README] and "X, 2030-01-02 |" in made[adamw_pages.README]
    page = made[adamw_pages.OPTIMIZER]
    assert "rates cost 1 to 26 % of a step" in page and "\n| bf16 | 1234 | " in page and "(torchao 0.18.0)" in page
    assert "\n| bf16 | ours | 1234 | 4.0 | 251 | 1.6, 2 |\n" in page and "\n| bf16 | torchao | 4321 | 4.0 | 170599 | 1.6, 1.8 |\n" in page


def test_ways_of_other_packages_begin_with_their_names() -> None:
    assert all(way.partition("_")[0] == other.package for way, other in OTHERS.items())
