"""Where a recipe works: its model, its output_dir, what is kept there, and what an artefact must be made from to be used again."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.data.encoding import Encoder
from adept_fast.data.items import Item, is_tokenised, tokenize_item
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.pipeline.datasets import Corpora
from adept_fast.pipeline.recipe import Recipe
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.input_files import read_yaml
from adept_fast.runtime.provenance import inputs_of, require_same
from adept_fast.runtime.staging_folder import locked
from adept_fast.settings.validation import shown
from adept_fast.tuning.methods import METHODS, Method

T = TypeVar("T")
FILES = ("scores.json", "unit_scores.json", "scores.png", "unit_scores.png", "trainer_log.jsonl", "eval.json", "recipe.yaml", "report.html")
FOLDERS = ("expanded", "tuned", "checkpoints")


class Workspace:
    """One recipe in one output_dir. say: where one line of news goes."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print) -> None:
        self.recipe, self.say = recipe, say
        # Resolved where it goes up, so that no folder is made for the way alone, and none that was there is taken for one made here.
        self.folder = Path(os.path.realpath(recipe.folder)) if ".." in recipe.folder.parts else recipe.folder
        self.scores_path, self.expanded, self.tuned = self.folder / "scores.json", self.folder / "expanded", self.folder / "tuned"
        self.log, self.checkpoints = self.folder / "trainer_log.jsonl", self.folder / "checkpoints"
        self.eval_path = self.folder / "eval.json"
        self.corpora = Corpora(recipe, lambda: self.tokenizer, say)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make output_dir and keep other runs out of it. Of several processes one does so.
        A folder that was made for nothing, as where the run is refused, does not stay."""
        self._require_free_names()
        missing = [folder for folder in (self.folder, *self.folder.parents) if distributed.leads() and not os.path.exists(folder)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: output_dir cannot be made ({error.strerror}): choose another") from None
        try:
            with self._locked() if distributed.leads() else nullcontext():
                yield
        finally:
            with suppress(OSError):  # the first that is not empty
                for folder in missing:
                    folder.rmdir()

    def _require_free_names(self) -> None:
        """Raise InputError where output_dir is something else, or what stands at an artefact's place cannot be one."""
        if os.path.exists(self.folder) and not self.folder.is_dir():
            raise InputError(f"{self.folder}: output_dir is a file: choose another")
        if os.path.exists(self.folder / "config.json"):
            raise InputError(f"{self.folder}: output_dir holds a model: choose another")
        for names, wrong, what in ((FILES, os.path.isdir, "a folder"), (FOLDERS, os.path.isfile, "a file")):
            for path in map(self.folder.joinpath, names):
                if wrong(path):
                    raise InputError(f"{path}: {what}, in the place of what a run writes: move it away or choose another output_dir")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold output_dir/.lock. A file of that name that something else has made is neither written to nor deleted."""
        path = self.folder / ".lock"
        lock = _opened(path)
        try:
            free = locked(lock)
            if free is None:
                self.say(f"{self.folder}: its file system has no locks: see that no other run works in it")
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

    @cached_property
    def source(self) -> Path:
        return checkpoint.resolve(self.recipe.model_name_or_path, self.recipe.revision)

    @cached_property
    def identity(self) -> str:
        return fingerprint(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.source, self.recipe.trust_remote_code)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.recipe.special_tokens)

    @cached_property
    def positions(self) -> int:
        return checkpoint.positions(self.source)

    @cached_property
    def earlier(self) -> AdeptConfig | None:
        """The record of a model that is expanded already: its copies stay as they are, and are not copied."""
        return AdeptConfig.find(self.source)

    def vocabulary(self, records: Iterable[Record]) -> int | None:
        """How many tokens the model has, where some of these records are tokenised already."""
        return vocabulary_of(self.skeleton) if any(map(is_tokenised, records)) else None

    @cached_property
    def skeleton(self) -> Any:
        """The model without its weights."""
        return checkpoint.load_skeleton(self.source, self.recipe.trust_remote_code, self.recipe.attn_implementation)

    @property
    def method(self) -> Method:
        return METHODS[self.recipe.method]

    @property
    def loading(self) -> dict[str, Any]:
        return {key: getattr(self.recipe, key) for key in ("dtype", "attn_implementation", "trust_remote_code")}

    def load(self, folder: Path) -> Any:
        return checkpoint.load_model(folder, **self.loading)

    def base_inputs(self) -> dict[str, Any]:
        keys = ("dtype", "attn_implementation")
        given = {"model": self.identity, "probe.column": self.recipe.probe.column, **{key: getattr(self.recipe, key) for key in keys}}
        return given if self.recipe.special_tokens == "text" else {**given, "special_tokens": self.recipe.special_tokens}

    def copies_inputs(self, layers: Sequence[int]) -> dict[str, Any]:
        """The initialisation is among them where it is not what it is by default."""
        how = self.recipe.expand.initialisation
        return {"expand.layers": list(layers), **({} if how == "zero_output" else {"expand.initialisation": how})}

    def kept(self, path: Path, read: Callable[[Path], T], inputs: dict[str, Any] | None = None) -> T | None:
        """The artefact at `path`; None where there is none. Raises InputError, naming what differs, for one that was made from others than
        `inputs` (none: than the recipe's model)."""
        if not path.exists():
            return None
        found = read(path)
        recorded, model = inputs_of(found), self.recipe.model_name_or_path
        if not isinstance(recorded, Mapping):
            raise InputError(f"{path}: its inputs are no table, but {shown(recorded)}: restore it, or remove it to make it again")
        if inputs is None:
            require_same(path, {"model": recorded.get("model")}, {"model": self.identity}, model)
        else:
            require_same(path, recorded, inputs, model)
            self.say(f"{path}: up to date")
        return found

    def copies(self) -> AdeptConfig:
        """The record of expanded/."""
        record = self.kept(self.expanded, AdeptConfig.load)
        if record is None:
            raise InputError(f"{self.expanded}: missing: run adept-fast expand first (the same recipe), or adept-fast run for all stages")
        return record

    def items(self, records: Iterable[Record], style: str = "plain") -> list[Item]:
        """Tokenised items that fit the model; those that do not are left out and counted."""
        limit = self.positions
        records = list(records)
        vocabulary = self.vocabulary(records)
        items = [tokenize_item(record, self.encoder, style, vocabulary) for record in records]
        self.encoder.warn_of_control_tokens("probe")
        fitting = [item for item in items if len(item.input_ids) <= limit and item.supervised]
        if not fitting:
            raise InputError(f"{self.recipe.probe.path}: no item with supervised tokens fits the model's {limit} positions")
        if len(fitting) < len(items):
            self.say(f"{len(items) - len(fitting)} of {len(items)} probe items are left out: too long for the model, or nothing supervised")
        return fitting

    def tell(self, line: str | None) -> None:
        """Say a line, if there is one."""
        if line:
            self.say(line)

    def keep_recipe(self) -> None:
        """recipe.yaml: the resolved recipe, which makes the run again."""
        write_text(self.folder / "recipe.yaml", _as_yaml(json.loads(json.dumps(self.recipe.as_dict(), default=str))))

    def check_kept_recipe(self) -> None:
        """Raise InputError where output_dir has a recipe.yaml that no run has written, which `keep_recipe` would overwrite."""
        path = self.folder / "recipe.yaml"
        if not path.exists():
            return
        content = read_yaml(path)
        if not content.keys() >= {entry.name for entry in fields(self.recipe)} or _as_yaml(content) != path.read_text(encoding="utf-8"):
            raise InputError(f"{path}: not as a run writes it, which would overwrite it: rename it, or choose another output_dir")


def _as_yaml(content: Any) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _opened(path: Path) -> int:
    """The lock's file, which is made where there is none. Raises InputError for what no run has made, and where none can be."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if os.path.lexists(path) and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise InputError(f"{path}: not the lock of a run ({error.strerror}): remove it or choose another output_dir") from None
        raise InputError(f"{path.parent}: output_dir cannot be written to ({error.strerror}): mend that or choose another") from None
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise InputError(f"{path}: not the lock of a run, which is a file: remove it or choose another output_dir")
    return lock
