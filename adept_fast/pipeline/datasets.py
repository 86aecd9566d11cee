"""The corpora of a recipe, read once, each record with one purpose: score, steer, report; train, be held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from adept_fast.data.documents import WeightedDocuments, tokenize_documents
from adept_fast.data.items import check_item, content_hash, document_text, is_choice
from adept_fast.data.readers import read, reader
from adept_fast.data.sources import Record, Source
from adept_fast.data.splits import HELD_OUT, ProbeParts, by_hash, falls_out, hold_out, split_probe
from adept_fast.data.stream import StreamedText
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe

METERED = 4  # of so many steering records one meters forgetting
STREAM_ABOVE = 1 << 30  # bytes of files: what is tokenised in memory takes several times as much
HELD_OUT_OF_A_STREAM = 256  # documents of a source to measure on; more fall out, and are not trained on either


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

    def tokenize(self, tokenizer: Any, quiet: bool = False) -> WeightedDocuments:
        return WeightedDocuments(tokenize_documents(self.texts, tokenizer, quiet), self.weights)


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

    def domain_scoring(self) -> list[Record]:
        """Documents of the domain to score beside the probe: of those that are trained on (the first of a stream), drawn by hash."""
        if self.streamed:
            texts = [text for source in self.recipe.domain for text in islice(self._stream.texts(source), HELD_OUT_OF_A_STREAM)]
        else:
            texts = [text for text, _ in self._documents if text not in self._purposes]
        records = [Record({"text": text}, "domain document") for text in texts]
        return by_hash(records, self.recipe.score.seed)[: self.recipe.score.domain_items]

    def steering(self) -> list[Record]:
        """Records that unit rates are measured on: three of four of the steering part."""
        kept = [record for index, record in enumerate(self.probe.steering) if index % METERED != METERED - 1]
        return kept[: self.recipe.tune.max_items]

    def metering(self) -> list[Record]:
        """The fourth of each four, held back from that: what forgetting is metered on while training."""
        return self.probe.steering[METERED - 1 :: METERED][: self.recipe.tune.max_items]

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
        _ = self._sources
        return [(document_text(record, source.column), source.weight) for source in self.recipe.domain for record in read(source)]

    @cached_property
    def _held_out(self) -> list[Record]:
        """eval.domain as it is, or the documents that are held out."""
        given = self.recipe.eval.domain
        if given is not None:
            return _with_text(read(given), given.column)
        name = ", ".join(source.path for source in self.recipe.domain)
        held = self._fallen_out(name) if self.streamed else hold_out([text for text, _ in self._documents], name)
        return [Record({"text": text}, "held-out document") for text in sorted(held)]

    def _fallen_out(self, name: str) -> set[str]:
        """The first held-out documents of each domain source."""
        held: set[str] = set()
        for source in self.recipe.domain:
            texts = (document_text(record, source.column) for record in reader(source).records())
            held.update(islice((text for text in texts if falls_out(text)), HELD_OUT_OF_A_STREAM))
        if not held:
            raise InputError(f"{name}: no document falls to the held-out {HELD_OUT:.0%}: set eval.domain")
        return held

    @cached_property
    def streamed(self) -> bool:
        """Whether training reads its documents while it trains."""
        wanted = self.recipe.tune.streaming
        mixed = any(source.share is not None for source in self._sources)
        if mixed and wanted is False:
            raise InputError("tune.streaming=false: a source's share of the tokens needs a stream: leave streaming out, or give weights")
        if wanted is not None or mixed:
            return wanted or mixed
        return sum(source.file.stat().st_size for source in self._sources if os.path.isfile(source.file)) > STREAM_ABOVE

    @property
    def _sources(self) -> tuple[Source, ...]:
        if not self.recipe.domain:
            raise InputError("domain is missing: give it as domain=file or in the recipe")
        replay = self.recipe.tune.replay
        return self.recipe.domain if replay is None else (*self.recipe.domain, replay)

    def held_out(self, limit: int | None) -> list[Record]:
        return by_hash(self._held_out)[:limit]

    @cached_property
    def _purposes(self) -> set[str]:
        """Texts that serve another purpose than training. Of a stream's held-out documents only those that are measured."""
        parts, general = self.probe, self.recipe.eval.general
        probe = _texts([*parts.scoring, *parts.steering, *parts.reporting], self.recipe.probe.column)
        return probe | _texts(self._held_out) | (set() if general is None else _texts(read(general), general.column))

    @cached_property
    def _training(self) -> TrainingText:
        replay = self.recipe.tune.replay
        documents = list(self._documents)
        if replay is not None:
            documents += [(document_text(record, replay.column), replay.weight) for record in read(replay)]
        kept = [(text, weight) for text, weight in documents if text not in self._purposes]
        if not kept:
            raise InputError("domain: every document is held out or stands in the probe or eval.general: none is left to train on")
        return TrainingText([text for text, _ in kept], np.array([float(weight) for _, weight in kept]))

    @cached_property
    def _stream(self) -> StreamedText:
        purposes = {hashlib.sha256(text.encode()).digest() for text in self._purposes}
        share = HELD_OUT if self.recipe.eval.domain is None else 0.0

        def keep(text: str) -> bool:
            return hashlib.sha256(text.encode()).digest() not in purposes and not falls_out(text, share)

        excluded = hashlib.sha256(b"".join(sorted(purposes)) + str(share).encode()).hexdigest()
        return StreamedText(self._sources, keep, excluded, self.recipe.tune.shuffle_window)

    def training(self) -> TrainingText | StreamedText:
        """Domain and replay documents that serve no other purpose."""
        return self._stream if self.streamed else self._training


def _texts(records: Sequence[Record], column: str | None = None) -> set[str]:
    return {document_text(record, column) for record in records if not is_choice(record) and "input_ids" not in record.content}


def _with_text(records: Sequence[Record], column: str | None) -> list[Record]:
    """Records whose text stands in `column`, with it under "text"."""
    return [Record({"text": document_text(record, column)}, record.where) for record in records] if column else list(records)
