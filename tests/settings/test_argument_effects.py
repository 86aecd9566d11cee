"""Every TrainingArguments field is sorted by what it does to a run, and one that is not known counts as one that changes it."""

from __future__ import annotations

from itertools import combinations

from adept_fast.settings.argument_effects import CHANGES, LAYOUT, NO_BIT, SCHEDULE, changes_the_run
from adept_fast.settings.training_arguments import known


def test_every_argument_of_the_installed_transformers_is_sorted_once() -> None:
    tables = NO_BIT, LAYOUT, SCHEDULE, CHANGES
    assert all(not one & other for one, other in combinations(tables, 2))
    assert frozenset().union(*tables) >= known().keys()


def test_an_unknown_argument_changes_the_run() -> None:
    assert changes_the_run("invented_in_a_later_version") and all(map(changes_the_run, CHANGES))
    assert not any(map(changes_the_run, NO_BIT | LAYOUT | SCHEDULE))
