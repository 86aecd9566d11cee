"""Where a recipe works: its model, its output_dir, what is kept there, and what an artefact must be made from to be used again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.data.items import Item, tokenize_item
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.models import vocabulary_of
from adept_fast.pipeline.datasets import Corpora
from adept_fast.pipeline.recipe import Recipe
from adept_fast.runtime import distributed
from adept_fast.runtime.atomic_files import remove_leftovers, write_text
from adept_fast.runtime.provenance import inputs_of, require_same
from adept_fast.tuning.methods import METHODS, Method

T = TypeVar("T")


class Workspace:
    """One recipe in one output_dir. say: where one line of news goes; quiet: no progress."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False) -> None:
        self.recipe, self.say, self.quiet = recipe, say, quiet
        self.folder = recipe.folder
        self.scores_path, self.expanded, self.tuned = self.folder / "scores.json", self.folder / "expanded", self.folder / "tuned"
        self.log, self.checkpoints = self.folder / "trainer_log.jsonl", self.folder / "checkpoints"
        self.eval_path = self.folder / "eval.json"
        self.corpora = Corpora(recipe)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make output_dir, keep other runs out of it, and clear what a killed one left half written. Of several processes one does so.
        A folder that was made for nothing, as where the run is refused, does not stay."""
        if os.path.exists(self.folder) and not self.folder.is_dir():
            raise InputError(f"{self.folder}: output_dir is a file: choose another")
        if os.path.exists(self.folder / "config.json"):
            raise InputError(f"{self.folder}: output_dir holds a model: choose another")
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

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.folder / ".lock"
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = not os.fstat(lock.fileno()).st_nlink  # by a run that ended after the file was opened here
            except BlockingIOError:
                taken = True
            if taken:
                raise InputError(f"{self.folder}: another run is working in this output_dir")
            try:
                remove_leftovers(self.folder)
                yield
            finally:
                path.unlink(missing_ok=True)

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
    def positions(self) -> int:
        return checkpoint.positions(self.source)

    @cached_property
    def earlier(self) -> AdeptConfig | None:
        """The record of a model that is expanded already: its copies stay as they are, and are not copied."""
        return AdeptConfig.find(self.source)

    def vocabulary(self, records: Iterable[Record]) -> int | None:
        """How many tokens the model has, where some of these records are tokenised already."""
        return vocabulary_of(self.skeleton) if any("input_ids" in record.content for record in records) else None

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
        return {"model": self.identity, "probe.column": self.recipe.probe.column, **{key: getattr(self.recipe, key) for key in keys}}

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
        items = [tokenize_item(record, self.tokenizer, style, self.recipe.probe.column, vocabulary) for record in records]
        fitting = [item for item in items if len(item.input_ids) <= limit and item.supervised]
        if not fitting:
            raise InputError(f"{self.recipe.probe.path}: no item with supervised tokens fits the model's {limit} positions")
        if len(fitting) < len(items):
            self.say(f"{len(items) - len(fitting)} of {len(items)} probe items are left out: too long for the model, or nothing supervised")
        return fitting

    def keep_recipe(self) -> None:
        """recipe.yaml: the resolved recipe, which makes the run again."""
        import yaml

        content = json.loads(json.dumps(self.recipe.as_dict(), default=str))
        write_text(self.folder / "recipe.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
