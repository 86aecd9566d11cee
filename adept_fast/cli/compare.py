"""`adept-fast compare FOLDER ...`: several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from adept_fast.settings import key_value
from adept_fast.settings.validation import declare


@dataclass(frozen=True, kw_only=True)
class Compare:
    output_dir: str = declare("comparison", meaning="folder of compare.html and compare.json")


def run(name: str, words: Sequence[str]) -> str:
    from adept_fast.report.compare_runs import compare

    given = [word for word in words if "=" in word and not os.path.isdir(word)]
    settings = key_value.settings(Compare, given)
    return f"comparison: {compare([word for word in words if word not in given], settings.output_dir)}"
