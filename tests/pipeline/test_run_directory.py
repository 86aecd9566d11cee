"""output_dir: what a run did not make there is neither written to nor deleted, least of all by a command that refuses."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adept_fast.errors import InputError
from adept_fast.pipeline import recipe
from adept_fast.pipeline.run_directory import FILES, FOLDERS, RunDirectory
from adept_fast.runtime.disk_errors import DiskError
from adept_fast.tuning.trainer_log import TrainerLog

LEFT = ".adept_fast-0123456789abcdef.partial"


@pytest.fixture
def work(tmp_path: Path) -> RunDirectory:
    (tmp_path / "out").mkdir()
    return RunDirectory(tmp_path / "out")


def test_a_refusal_deletes_nothing(work: RunDirectory) -> None:
    (work.folder / ".partial-mine").write_text("kept")
    (work.folder / LEFT).mkdir()
    before = {*work.folder.rglob("*")}
    with pytest.raises(InputError, match="refused"), work.held():
        raise InputError("refused")
    assert {*work.folder.rglob("*")} == before


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_lock_is_named_and_stays(work: RunDirectory, tmp_path: Path, kind: str) -> None:
    lock, precious = work.folder / ".lock", tmp_path / "precious"
    precious.write_text("kept")
    {
        "link": lambda: lock.symlink_to(precious),
        "dangling": lambda: lock.symlink_to(tmp_path / "nowhere"),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }[kind]()
    with pytest.raises(InputError, match=r"out/\.lock: not the lock of a run.*: remove it or choose another output_dir"), work.held():
        pass
    assert precious.read_text() == "kept" and os.path.lexists(lock) and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("hard", [True, False])
def test_a_file_of_the_locks_name_keeps_its_content(work: RunDirectory, tmp_path: Path, hard: bool) -> None:
    lock, precious = work.folder / ".lock", tmp_path / "precious"
    precious.write_text("" if hard else "kept")
    os.link(precious, lock)
    if not hard:
        precious.unlink()
    with work.held():
        assert lock.read_text() == ("" if hard else "kept")
    assert lock.read_text() == ("" if hard else "kept")


def test_a_lock_of_a_killed_run_goes(work: RunDirectory) -> None:
    (work.folder / ".lock").touch()
    with work.held():
        pass
    assert not [*work.folder.iterdir()]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("nothing")])
@pytest.mark.parametrize("name", ["trainer_log.jsonl", "tuned"])
def test_a_pipe_or_a_dead_link_is_no_artefact(work: RunDirectory, name: str, make: Callable[[Path], None]) -> None:
    make(work.folder / name)
    with pytest.raises(InputError, match=f"out/{name}: a pipe or dead link, in the place of what a run writes"), work.held():
        pytest.fail("started")
    assert os.path.lexists(work.folder / name)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_cannot_be_an_artefact_is_named_before_anything_starts(work: RunDirectory, name: str) -> None:
    path = work.folder / name
    path.touch() if name in FOLDERS else path.mkdir()
    what = "a file" if name in FOLDERS else "a folder"
    with pytest.raises(InputError, match=f"out/{name}: {what}, in the place of what a run writes: move it away"), work.held():
        pass
    assert [*work.folder.iterdir()] == [path]


@pytest.mark.parametrize("how", ["link", "slash", "up", "newline"])
def test_an_output_dir_by_another_name(work: RunDirectory, tmp_path: Path, how: str) -> None:
    (tmp_path / "link").symlink_to(work.folder)
    name = {"link": "link", "slash": "out/", "up": "new/../out", "newline": "o\nut"}[how]
    named = RunDirectory(tmp_path / name)
    with named.held():
        assert (named.folder / ".lock").is_file()
        if how != "newline":
            with pytest.raises(InputError, match="another run is working in this output_dir"), work.held():
                pass
    assert not [*work.folder.iterdir()] and {path.name for path in tmp_path.iterdir()} == {"out", "link"}


@pytest.mark.parametrize("name", ["/", "//", "~", "~/", "{home}", "{home}/sub/..", "link"])
def test_a_folder_that_is_more_than_an_output_dir_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    what = "the root of the file system" if set(name) == {"/"} else "your home folder"
    named = RunDirectory(recipe.load(None, [f"output_dir={name.format(home=tmp_path / 'home')}"], required=()).folder)
    with pytest.raises(InputError, match=f"^[^ ]*: output_dir is {what}: choose a folder of its own, .*adept_out say$"), named.held():
        pass
    assert not [*(tmp_path / "home").iterdir()] and not Path("/.lock").exists()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may look into; those of pytest are its user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_another_user(action: Callable[[], object]) -> str:
    """What `action` raises for a user who is not root, in a child: type and text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            os.seteuid(65534)
            action()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
@pytest.mark.parametrize(
    ("mode", "name", "said"),
    [
        (0o555, "", "Permission denied: output_dir cannot be written to: mend that or choose another"),
        (0o555, "new/out", "output_dir cannot be made (Permission denied): choose another"),
        (0o700, "new", "output_dir cannot be made (Permission denied): choose another"),
        (0o700, "", "Permission denied: output_dir cannot be written to: mend that or choose another"),
    ],
)
def test_an_output_dir_of_another_user_is_refused_in_a_line(shared: Path, mode: int, name: str, said: str) -> None:
    (shared / "theirs").mkdir()
    (shared / "theirs").chmod(mode)
    folder = shared / "theirs" / name if name else shared / "theirs"
    work = RunDirectory(folder)
    assert as_another_user(work.held().__enter__) == f"InputError: {folder}: {said}"
    assert not [*(shared / "theirs").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("full", ["names", "bytes"])
def test_a_full_disk_is_told_in_a_line_and_nothing_is_half_written(tmp_path: Path, full: str) -> None:
    options = "nr_inodes=1" if full == "names" else "size=4k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        work, given = RunDirectory(tmp_path), recipe.load(None, [f"domain={'d' * 4000}.txt"], required=()).as_dict()
        if full == "names":
            with pytest.raises(DiskError, match="/.lock: No space left on device: make room on its disk, then the same command goes on"):
                work.held().__enter__()
        else:
            with pytest.raises(DiskError, match="/recipe.yaml: No space left on device: make room on its disk, then the same command"):
                with work.held():
                    work.keep_recipe(given)
        assert not [*tmp_path.iterdir()]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_recipe_that_no_run_has_written_is_not_overwritten(work: RunDirectory) -> None:
    given = recipe.Recipe().as_dict()
    work.check_kept_recipe(given)
    work.keep_recipe(given)
    work.check_kept_recipe(given)
    kept = work.folder / "recipe.yaml"
    for text in (kept.read_text() + "# mine\n", "model_name_or_path: model\n"):
        kept.write_text(text)
        with pytest.raises(InputError, match=r"recipe\.yaml: not as a run writes it"):
            work.check_kept_recipe(given)


@pytest.mark.parametrize("text", ["", '{"event": "pl', '{"event": "plan", "step": 0}\n'])
def test_a_log_of_a_run_is_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_log.jsonl").write_text(text)
    TrainerLog(tmp_path / "trainer_log.jsonl").require_own()


def test_a_log_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 10, "loss": 2.1}\n')
    with pytest.raises(InputError, match=r"trainer_log\.jsonl: not the log of a run, which would overwrite it: rename it"):
        TrainerLog(tmp_path / "trainer_log.jsonl").require_own()
