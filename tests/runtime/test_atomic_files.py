"""Files that are not the program's own stay as they are; its own are whole, and have the permissions that the umask gives."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import discard, staged_file, staged_folder, write_text
from adept_fast.runtime.disk_errors import DiskError
from adept_fast.runtime.staging_folder import LOCK, NAME, remove_leftovers

LEFT = ".adept_fast-0123456789abcdef.partial"


def left_by_a_killed_run(parent: Path, name: str = LEFT) -> Path:
    folder = parent / name
    (folder / "tuned").mkdir(parents=True)
    (folder / LOCK).touch()
    (folder / "tuned" / "model.safetensors").write_bytes(b"half")
    return folder


def test_leftovers_go_when_something_is_written_beside_them_and_nothing_else_does(tmp_path: Path) -> None:
    killed, early = left_by_a_killed_run(tmp_path), tmp_path / LEFT.replace("0", "a")
    early.mkdir()  # killed before there was a lock
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (tmp_path / LEFT.replace("1", "b")).symlink_to(outside)
    others = [".partial-foo", ".partial-0123456789abcdef-scores.json", LEFT + "~", "x" + LEFT, LEFT.replace("f.", "g."), LEFT.upper()]
    for name in others:
        left_by_a_killed_run(tmp_path, name)
    (tmp_path / LEFT.replace("2", "c")).write_text("a file of that name is no folder of the program's")
    before = {*tmp_path.rglob("*")} - {killed, early, *killed.rglob("*")}
    write_text(tmp_path / "scores.json", "{}")
    assert {*tmp_path.rglob("*")} == before | {tmp_path / "scores.json"}
    assert (outside / "precious").read_text() == "kept"


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "tuned") as staging:
        (staging / "weights").write_text("half")
        write_text(tmp_path / "scores.json", "{}")
        remove_leftovers(tmp_path)
        assert (staging / "weights").read_text() == "half"
        (staging / "weights").write_text("whole")
    assert {path.name: path.is_dir() for path in tmp_path.iterdir()} == {"scores.json": False, "tuned": True}
    assert (tmp_path / "tuned" / "weights").read_text() == "whole"


def test_a_staging_folder_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may see it in the moment before it is locked."""
    flock, taken = fcntl.flock, []

    def after_another(descriptor: int, how: int) -> None:
        if not taken:
            taken.extend(path for path in tmp_path.iterdir() if NAME.fullmatch(path.name))
            monkeypatch.setattr(fcntl, "flock", flock)
            remove_leftovers(tmp_path)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_another)
    write_text(tmp_path / "scores.json", "{}")
    assert len(taken) == 1 and [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    left = left_by_a_killed_run(tmp_path)
    write_text(tmp_path / "scores.json", "{}")
    assert left.is_dir() and (tmp_path / "scores.json").read_text() == "{}"


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_artefacts_get_the_permissions_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        with staged_file(tmp_path / "a.safetensors") as staging:
            save_file({"a": torch.ones(2)}, staging)  # which writes 0600
        with staged_folder(tmp_path / "tuned") as staging:
            (staging / "within").mkdir(0o700)
            save_file({"a": torch.ones(2)}, staging / "within" / "b.safetensors")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*")}
    assert found == {"a.safetensors": file, "tuned": folder, "within": folder, "b.safetensors": file}


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "scores.json").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "scores.json", "{}")
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "scores.json").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dangling exists already"), staged_folder(tmp_path / "dangling"):
        pass


def test_a_hard_link_keeps_its_other_name(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    os.link(tmp_path / "precious", tmp_path / "scores.json")
    write_text(tmp_path / "scores.json", "{}")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(InputError, match=r"scores\.json: a folder, but a file is to be written"):
        write_text(tmp_path / "scores.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_two_that_write_the_same_folder_end_in_one_whole_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tuned was made by another process in the meantime"), staged_folder(tmp_path / "tuned") as slow:
        (slow / "who").write_text("slow")
        with staged_folder(tmp_path / "tuned") as quick:
            (quick / "who").write_text("quick")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"] and (tmp_path / "tuned" / "who").read_text() == "quick"


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_there_until_a_whole_one_replaces_it(tmp_path: Path, exchanged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanged:
        monkeypatch.setattr("adept_fast.runtime.atomic_files._exchange", lambda *_: False)
    who = tmp_path / "checkpoint-3" / "who"
    for name in ("first", "second"):
        with staged_folder(who.parent, replace=True) as staging:
            (staging / "who").write_text(name)
            assert name == "first" or who.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), staged_folder(who.parent, replace=True) as staging:
        (staging / "who").write_text("third")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"] and who.read_text() == "second"


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "whole")
    assert (tmp_path / ("x" * 255)).read_text() == "whole"
    discarded = tmp_path / ("y" * 255)
    discarded.mkdir()
    discard(discarded)
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "No space left on device: make room on its disk, then the same command goes on"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device: make room on its disk, "),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "could not be written: make room on its disk, "),
        (PermissionError(errno.EACCES, "no", "beneath"), "Permission denied: give yourself the permission"),
    ],
)
def test_what_the_disk_refuses_is_told_with_the_file_and_the_way_out(tmp_path: Path, raised: Exception, said: str) -> None:
    if isinstance(raised, OSError) and raised.filename:
        raised.filename = str(tmp_path / raised.filename)
    with pytest.raises(DiskError) as error, staged_folder(tmp_path / "tuned") as staging, staged_file(staging / "config.json"):
        raise raised
    assert str(error.value).startswith(f"{tmp_path / 'tuned'}: {said}") and not [*tmp_path.iterdir()]


def test_what_could_not_be_read_keeps_its_own_name(tmp_path: Path) -> None:
    unread = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")
    with pytest.raises(PermissionError, match="/elsewhere/model") as error, staged_file(tmp_path / "tuned"):
        raise unread
    assert error.value is unread
