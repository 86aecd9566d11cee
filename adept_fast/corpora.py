"""The corpora of a recipe, read once, each record with one purpose: score, steer, report; train, be held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from adept_fast.data.documents import Documents, tokenize_documents
from adept_fast.data.items import check_item, content_hash, document_text
from adept_fast.data.sources import Record, Source, read
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
    def _domain(self) -> tuple[list[tuple[Source, list[Record]]], list[Record]]:
        """Training records by source, and held-out records (documents as training sees them, or eval.domain as it is)."""
        if not self.recipe.domain:
            raise InputError("domain is missing: give it as domain=file or in the recipe")
        sources = [(source, read(source)) for source in self.recipe.domain]
        given = self.recipe.eval.domain
        if given is not None:
            return sources, _with_text(read(given), given.column)
        split = [(source, hold_out(records, source.path)) for source, records in sources]
        held = [Record({"text": document_text(record, source.column)}, record.where) for source, sides in split for record in sides[1]]
        return [(source, sides[0]) for source, sides in split], held

    def held_out(self, limit: int | None) -> list[Record]:
        return by_hash(self._domain[1])[:limit]

    @cached_property
    def _training(self) -> TrainingText:
        parts = list(self._domain[0])
        if self.recipe.tune.replay is not None:
            parts.append((self.recipe.tune.replay, read(self.recipe.tune.replay)))
        texts = [document_text(record, source.column) for source, records in parts for record in records]
        weights = [float(source.weight) for source, records in parts for _ in records]
        return TrainingText(texts, np.array(weights))

    def training(self) -> TrainingText:
        return self._training
