"""Damaged files: a right result, or one line that names the file; no traceback, hang, signal or memory without bound."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import fuzzer

pytestmark = pytest.mark.slow

CASES = 200  # make nightly runs 1,500


def test_damaged_files_are_read_right_or_refused_by_name() -> None:
    with fuzzer(seed=0) as made:
        verdicts = [made.run(number) for number in range(CASES)]
    wrong = [f"{verdict.fault}\n  {verdict}\n  {verdict.again(0)}" for verdict in verdicts if verdict.fault]
    assert not wrong, "\n".join([f"{len(wrong)} of {CASES}", *wrong])
    assert {verdict.code for verdict in verdicts} == {0, 2}
