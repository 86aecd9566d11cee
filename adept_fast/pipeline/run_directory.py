"""output_dir: its paths and its lock, and which of its artefacts are used again."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from adept_fast.errors import InputError
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.disk_errors import UNKNOWN, DiskError, disk_error_line
from adept_fast.runtime.input_files import read_yaml
from adept_fast.runtime.provenance import inputs_of, require_same
from adept_fast.runtime.staging_folder import locked
from adept_fast.settings.validation import shown

T = TypeVar("T")
FILES = (
    *("scores.json", "unit_scores.json", "scores.png", "unit_scores.png"),
    *("trainer_log.jsonl", "eval.json", "eval.items.safetensors", "recipe.yaml", "report.html"),
)
FOLDERS = ("expanded", "tuned", "checkpoints")

logger = logging.getLogger(__name__)


class RunDirectory:
    """Paths, lock and artefacts of one output_dir."""

    def __init__(self, folder: Path) -> None:
        # Resolved where it goes up, so that no folder is made for the way alone, and none that was there is taken for one made here.
        self.folder = Path(os.path.realpath(folder)) if ".." in folder.parts else folder
        self.scores, self.unit_scores = self.folder / "scores.json", self.folder / "unit_scores.json"
        self.expanded, self.tuned = self.folder / "expanded", self.folder / "tuned"
        self.log, self.checkpoints = self.folder / "trainer_log.jsonl", self.folder / "checkpoints"
        self.evaluation, self.recipe = self.folder / "eval.json", self.folder / "recipe.yaml"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make output_dir and lock it against other runs (in the main process).

        If the run is refused, an output_dir that was made for it is removed.
        """
        self.require_free_names()
        missing = [folder for folder in (self.folder, *self.folder.parents) if distributed.is_main() and not os.path.exists(folder)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: output_dir cannot be made ({error.strerror}): choose another") from None
        try:
            with self._locked() if distributed.is_main() else nullcontext():
                yield
        finally:
            with suppress(OSError):  # the first that is not empty
                for folder in missing:
                    folder.rmdir()

    def require_free_names(self) -> None:
        """Raise InputError if output_dir or the path of an artefact is taken by something else."""
        if os.path.exists(self.folder) and not self.folder.is_dir():
            raise InputError(f"{self.folder}: output_dir is a file: choose another")
        for place, what in ((os.sep, "the root of the file system"), (os.path.expanduser("~"), "your home folder")):
            if os.path.realpath(self.folder) == os.path.realpath(place):
                raise InputError(f"{self.folder}: output_dir is {what}: choose a folder of its own, {self.folder / 'adept_out'} say")
        if os.path.exists(self.folder / "config.json"):
            raise InputError(f"{self.folder}: output_dir holds a model: choose another")
        for names, right in ((FILES, os.path.isfile), (FOLDERS, os.path.isdir)):
            for artefact in map(self.folder.joinpath, names):
                if os.path.lexists(artefact) and not right(artefact):
                    what = "a folder" if os.path.isdir(artefact) else "a file" if os.path.isfile(artefact) else "a pipe or dead link"
                    raise InputError(f"{artefact}: {what}, in the place of what a run writes: move it away or choose another output_dir")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold output_dir/.lock. A file of that name from another program is neither written nor deleted."""
        path = self.folder / ".lock"
        lock = _opened(path)
        try:
            free = locked(lock)
            if free is None:
                logger.warning(f"{self.folder}: its file system has no locks: see that no other run works in it")
            if free is False or not os.fstat(lock).st_nlink:  # a run that ended after the file was opened here has removed it
                raise InputError(f"{self.folder}: another run is working in this output_dir")
            try:
                yield
            finally:
                with suppress(FileNotFoundError):  # output_dir was removed
                    held = os.fstat(lock)
                    if os.path.samestat(held, path.lstat()) and not held.st_size and held.st_nlink == 1:
                        path.unlink()
        finally:
            os.close(lock)

    def kept(self, path: Path, read: Callable[[Path], T], inputs: Mapping[str, Any], model: str, whole: bool = True) -> T | None:
        """Return the artefact at `path`, read by `read`; None if there is none.

        inputs: what it must have been made from. whole: compare all of that, or only the keys of `inputs`. model: its name in messages.
        Raises InputError that names what differs if it was made from other inputs.
        """
        if not path.exists():
            return None
        found = read(path)
        recorded = inputs_of(found)
        if not isinstance(recorded, Mapping):
            raise InputError(f"{path}: its inputs are no table, but {shown(recorded)}: restore it, or remove it to make it again")
        require_same(path, recorded if whole else {key: recorded.get(key) for key in inputs}, inputs, model)
        if whole:
            logger.info(f"{path}: up to date")
        return found

    def keep_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Write recipe.yaml, the resolved recipe, which repeats the run."""
        write_text(self.recipe, _as_yaml(json.loads(json.dumps(recipe, default=str))))

    def check_kept_recipe(self, keys: Collection[str]) -> None:
        """Raise InputError if output_dir has a recipe.yaml that no run wrote, which `keep_recipe` would overwrite. keys: of all recipes."""
        if not self.recipe.exists():
            return
        content = read_yaml(self.recipe)
        if not content.keys() >= {*keys} or _as_yaml(content) != self.recipe.read_text(encoding="utf-8"):
            raise InputError(f"{self.recipe}: not as a run writes it, which would overwrite it: rename it, or choose another output_dir")


def _as_yaml(content: Any) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _opened(path: Path) -> int:
    """Open the lock file, and make it if there is none. Raises InputError if something else made it, or if it cannot be made."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if os.path.lexists(path) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path}: not the lock of a run ({error.strerror}): remove it or choose another output_dir") from None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskError(error.errno, disk_error_line(path, error.errno or UNKNOWN)) from None
        raise InputError(f"{path.parent}: {error.strerror}: output_dir cannot be written to: mend that or choose another") from None
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise InputError(f"{path}: not the lock of a run, which is a file: remove it or choose another output_dir")
    return lock
