"""The model that a recipe adapts, resolved, read and loaded at first use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.checkpoints.one_model import OneModel
from adept_fast.data.encoding import Encoder
from adept_fast.data.items import is_tokenised
from adept_fast.data.sources import Record
from adept_fast.models.decoder_layers import vocabulary_of
from adept_fast.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SourceModel:
    """The recipe's model: folder, digest, tokenizer and record. models: loads it and the models made from it with the recipe's options."""

    def __init__(self, recipe: Recipe) -> None:
        self.name, self._recipe = recipe.model_name_or_path, recipe
        self.models = OneModel(recipe.dtype, recipe.attn_implementation, recipe.trust_remote_code)

    @cached_property
    def folder(self) -> ModelFolder:
        return checkpoint.resolve(self.name, self._recipe.revision)

    @cached_property
    def identity(self) -> str:
        """Return a digest of its tensors, config and tokenizer."""
        return fingerprint(self.folder.path)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Return what every artefact is made from: the model, how it is loaded, and how text is encoded for it."""
        recipe = self._recipe
        how = {"probe.column": recipe.probe.column, "dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
        read = {} if recipe.special_tokens == "text" else {"special_tokens": recipe.special_tokens}
        return {"model": self.identity, **how, **read}

    @cached_property
    def tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.folder, self._recipe.trust_remote_code)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self._recipe.special_tokens)

    @property
    def positions(self) -> int:
        """Return the largest number of positions of the model."""
        return self.folder.positions

    @property
    def earlier(self) -> AdeptConfig | None:
        """Return the record of a model that is expanded already, or None. Its copies stay as they are, and are not copied."""
        return self.folder.record

    @property
    def skeleton(self) -> PreTrainedModel:
        """Return the model without its weights."""
        return self.folder.skeleton(self._recipe.trust_remote_code, self._recipe.attn_implementation)

    def load(self) -> PreTrainedModel:
        return self.models.load(self.folder)

    def vocabulary(self, records: Iterable[Record]) -> int | None:
        """Return the size of the vocabulary if some of these records are tokenised already, else None."""
        return vocabulary_of(self.skeleton) if any(map(is_tokenised, records)) else None
