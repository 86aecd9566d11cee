"""The house as docs/explanation/design.md draws it: which rooms there are, which floor each stands on, and how long a file may be."""

from __future__ import annotations

from pathlib import Path

from tests.support.module_map import DESIGN, arrows, floors, long_files, rooms, upward

MOST = 18  # names at the root


def test_the_map_names_every_room_and_no_other() -> None:
    named = floors(DESIGN.read_text(encoding="utf-8"))
    assert len(named) == len(set(named))
    assert {Path(room).stem for room in rooms()} - {"__init__", "__main__", "py"} == set(named)


def test_a_newcomer_can_take_in_the_root() -> None:
    assert len(rooms()) <= MOST


def test_imports_point_down() -> None:
    assert upward(arrows(), floors(DESIGN.read_text(encoding="utf-8"))) == {}


def test_no_file_is_longer_than_a_few_screens() -> None:
    assert long_files() == {}
