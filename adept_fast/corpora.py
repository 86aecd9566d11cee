"""The corpora of a recipe, read once, each record with one purpose: score, steer, report; train, be held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from adept_fast.data.documents import Documents, tokenize_documents
from adept_fast.data.items import check_item, content_hash, document_text, is_choice
from adept_fast.data.sources import Record, read
from adept_fast.data.splits import ProbeParts, by_hash, hold_out, split_probe
from adept_fast.errors import InputError
from adept_fast.recipe import Recipe


@dataclass(frozen=True)
class TrainingText:
    """Texts to train on and the passes that an epoch makes over each."""

    texts: list[str]
    weights: np.ndarray

    @property
    def digest(self) -> str:
        sha = hashlib.sha256()
        for text, weight in zip(self.texts, self.weights, strict=True):
            sha.update(hashlib.sha256(text.encode()).digest() + str(weight).encode())
        return sha.hexdigest()

    def tokenize(self, tokenizer: Any, quiet: bool | None = None) -> Documents:
        return tokenize_documents(self.texts, tokenizer, quiet)


def _with_text(records: Sequence[Record], column: str | None) -> list[Record]:
    """Records whose text stands in `column`, with it under "text"."""
    return [Record({"text": document_text(record, column)}, record.where) for record in records] if column else list(records)


class Corpora:
    """Reads what a stage asks for, when it asks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @staticmethod
    def digest(records: Sequence[Record]) -> str:
        return hashlib.sha256("".join(content_hash(record.content) for record in records).encode()).hexdigest()

    @cached_property
    def probe(self) -> ProbeParts:
        records = read(self.recipe.probe)
        for record in records:
            check_item(record, self.recipe.probe.column)
        return split_probe(records, self.recipe.probe.path)

    def scoring(self) -> list[Record]:
        return by_hash(self.probe.scoring, self.recipe.score.seed)[: self.recipe.score.max_items]

    def steering(self) -> list[Record]:
        return self.probe.steering[: self.recipe.tune.max_items]

    def reporting(self, limit: int | None) -> list[Record]:
        return self.probe.reporting[:limit]

    def evaluation_general(self, limit: int | None) -> list[Record]:
        """Records to report general competence on."""
        source = self.recipe.eval.general
        if source is None:
            return _with_text(self.reporting(limit), self.recipe.probe.column)
        return by_hash(_with_text(read(source), source.column))[:limit]

    @cached_property
    def _documents(self) -> list[tuple[str, float]]:
        """(text, weight) of every domain document."""
        if not self.recipe.domain:
            raise InputError("domain is missing: give it as domain=file or in the recipe")
        return [(document_text(record, source.column), source.weight) for source in self.recipe.domain for record in read(source)]

    @cached_property
    def _held_out(self) -> list[Record]:
        """eval.domain as it is, or the documents that are held out."""
        given = self.recipe.eval.domain
        if given is not None:
            return _with_text(read(given), given.column)
        texts = [text for text, _ in self._documents]
        held = hold_out(texts, ", ".join(source.path for source in self.recipe.domain))
        return [Record({"text": text}, "held-out document") for text in sorted(held)]

    def held_out(self, limit: int | None) -> list[Record]:
        return by_hash(self._held_out)[:limit]

    @cached_property
    def _training(self) -> TrainingText:
        replay = self.recipe.tune.replay
        documents = list(self._documents)
        if replay is not None:
            documents += [(document_text(record, replay.column), replay.weight) for record in read(replay)]
        parts = self.probe
        probe = _texts([*parts.scoring, *parts.steering, *parts.reporting], self.recipe.probe.column)
        purposes = probe | _texts(self._held_out)
        kept = [(text, weight) for text, weight in documents if text not in purposes]
        if not kept:
            raise InputError("domain: every document is held out or stands in the probe: none is left to train on")
        return TrainingText([text for text, _ in kept], np.array([float(weight) for _, weight in kept]))

    def training(self) -> TrainingText:
        """Domain and replay documents that serve no other purpose."""
        return self._training


def _texts(records: Sequence[Record], column: str | None = None) -> set[str]:
    return {document_text(record, column) for record in records if not is_choice(record) and "input_ids" not in record.content}
