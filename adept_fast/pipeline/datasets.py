"""Read a recipe's datasets once, and give each record one purpose: score, steer, report, train or be held out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice

import numpy as np

from adept_fast.data.documents import WeightedDocuments, tokenize_documents
from adept_fast.data.encoding import Encoder
from adept_fast.data.items import Item, content_hash, is_tokenised, tokenize
from adept_fast.data.readers import read, reader
from adept_fast.data.records import parse_record
from adept_fast.data.source_files import source_files
from adept_fast.data.source_summary import SourceSummary
from adept_fast.data.sources import Record, Source
from adept_fast.data.splits import ProbeParts, by_hash, hold_out, hold_out_of_streams, is_held_out, split_probe
from adept_fast.data.streamed_text import StreamedText
from adept_fast.data.templates import document_text
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe
from adept_fast.pipeline.source_model import SourceModel

HELD, MEASURED = "held out", "in the probe or eval"  # why a document is not trained on
METERED = 4  # of so many steering records one meters forgetting
STREAM_ABOVE = 1 << 30  # bytes of files: what is tokenised in memory takes several times as much
HELD_OUT_OF_A_STREAM = 256  # documents of a source to measure on; more fall out, and are not trained on either

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingText:
    """Texts to train on.

    weights: passes over each text per epoch. read: summary of each source. sources: index of each text's source in `read`
    """

    texts: list[str]
    weights: np.ndarray
    read: tuple[SourceSummary, ...] = ()
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def digest(self) -> str:
        sha = hashlib.sha256()
        for text, weight in zip(self.texts, self.weights, strict=True):
            sha.update(hashlib.sha256(text.encode()).digest() + str(weight).encode())
        return sha.hexdigest()

    @property
    def shown(self) -> list[int]:
        """Return the indices of two texts to show: the first of each of the first two sources, or the first two."""
        firsts = [int(np.argmax(self.sources == number)) for number in range(len(self.read)) if (self.sources == number).any()]
        return (firsts if len(firsts) > 1 else [*range(min(2, len(self.texts)))])[:2]

    def tokenize(self, encoder: Encoder) -> WeightedDocuments:
        documents = tokenize_documents(self.texts, encoder)
        for number, summary in enumerate(self.read):
            summary.tokens = int(np.diff(documents.starts)[self.sources == number].sum())
        return WeightedDocuments(documents, self.weights)


class Datasets:
    """Read what a stage needs when it needs it. source: the model whose tokenizer and chat template encode the texts."""

    def __init__(self, recipe: Recipe, source: SourceModel) -> None:
        self.recipe, self.source = recipe, source
        self._read: dict[Source, list[Record]] = {}
        self._summaries: list[tuple[str, SourceSummary]] = []

    def _records(self, purpose: str, source: Source) -> list[Record]:
        """Read a source once, and return its records without those left out."""
        if source not in self._read:
            summary = self._summary(source)
            self._read[source] = [record for record in read(source) if summary.take(record, parse_record) is not None]
            if not self._read[source]:
                raise InputError(f"{source.path}: nothing is left to read of it ({summary.left_out})")
            self._summaries.append((purpose, summary))
            for note in summary.notes():
                logger.warning(note)
        return self._read[source]

    def _summary(self, source: Source) -> SourceSummary:
        return SourceSummary(source, self.recipe.malformed_rows, source_files(source))

    @cached_property
    def _trained(self) -> list[SourceSummary]:
        """Yield the documents of each source that is trained on."""
        return [self._summary(source) for source in self.trained_on]

    def _texts_to_train_on(self, number: int) -> list[tuple[str, int]]:
        """Yield each text of source `number`, with the number."""
        summary, source = self._trained[number], self.trained_on[number]
        texts = (summary.take(record, self._text) for record in read(source))
        return [(text, number) for text in texts if text is not None]

    def _text(self, record: Record) -> str | None:
        return document_text(record, self.source.tokenizer)

    def summaries(self) -> list[tuple[str, SourceSummary]]:
        """Return what was read so far and for which purpose; for a stream, what one pass over it finds."""
        if not self.recipe.domain:
            return self._summaries
        trained = self._stream.summaries(self.source.tokenizer) if self.streamed else self._trained
        purposes = ["domain" if number < len(self.recipe.domain) else "replay" for number in range(len(trained))]
        return [*zip(purposes, trained, strict=True), *self._summaries]

    @staticmethod
    def digest(records: Sequence[Record]) -> str:
        return hashlib.sha256("".join(content_hash(record.content) for record in records).encode()).hexdigest()

    @cached_property
    def probe(self) -> ProbeParts:
        return split_probe(self._records("probe", self.recipe.probe), self.recipe.probe.path)

    def scoring(self) -> list[Record]:
        return by_hash(self.probe.scoring, self.recipe.score.seed)[: self.recipe.score.max_items]

    def domain_scoring(self) -> list[Record]:
        """Return domain documents to score beside the probe, drawn by hash from those that are trained on (the first of a stream)."""
        if self.streamed:
            passes = [self._stream.texts(source, self.source.tokenizer) for source in self.recipe.domain]
            texts = [text for texts in passes for text in islice(texts, HELD_OUT_OF_A_STREAM)]
        else:
            texts = [text for text, _ in self._documents if text not in self._purposes]
        records = [Record({"text": text}, "domain document") for text in texts]
        return by_hash(records, self.recipe.score.seed)[: self.recipe.score.domain_items]

    def steering(self) -> list[Record]:
        """Return the records that unit rates are measured on: three in four of the steering part."""
        kept = [record for index, record in enumerate(self.probe.steering) if index % METERED != METERED - 1]
        return kept[: self.recipe.tune.max_items]

    def metering(self) -> list[Record]:
        """Return every fourth record of the steering part, on which forgetting is measured during training."""
        return self.probe.steering[METERED - 1 :: METERED][: self.recipe.tune.max_items]

    def reporting(self, limit: int | None) -> list[Record]:
        return self.probe.reporting[:limit]

    def evaluation_general(self, limit: int | None) -> list[Record]:
        """Return the records that general competence is reported on."""
        source = self.recipe.eval.general
        if source is None:
            return self._with_text(self.reporting(limit), self.recipe.probe.column)
        return by_hash(self._with_text(self._records("eval", source), source.column))[:limit]

    @cached_property
    def _further(self) -> dict[str, list[Record]]:
        """Return the records of each corpus of eval.also."""
        found = {}
        for name, source in (self.recipe.eval.also or {}).items():
            if source.held_out:
                found[name] = self._held_out_of(source)
            else:
                found[name] = self._with_text(self._records("eval", source), source.column)
        return found

    def further(self, limit: int | None) -> dict[str, list[Record]]:
        """Return the records of further corpora to report on, by name."""
        return {name: by_hash(records)[:limit] for name, records in self._further.items()}

    def _held_out_of(self, source: Source) -> list[Record]:
        """Return the documents that a run with this source as its domain holds out."""
        if (files := source_files(source)) and files.bytes > STREAM_ABOVE:
            return _documents_of(self._fallen([source])[0])
        return _documents_of(hold_out([text for record in self._records("eval", source) if (text := self._text(record))], source.path))

    @cached_property
    def _documents(self) -> list[tuple[str, int]]:
        """Return every domain document with the index of its source."""
        _ = self.trained_on
        return [document for number in range(len(self.recipe.domain)) for document in self._texts_to_train_on(number)]

    @cached_property
    def _held_out(self) -> list[Record]:
        """Return the documents of eval.domain, or those held out of the domain."""
        given = self.recipe.eval.domain
        if given is not None:
            return self._with_text(self._records("eval", given), given.column)
        name = ", ".join(source.path for source in self.recipe.domain)
        texts = [] if self.streamed else [text for text, _ in self._documents]
        try:
            held = self._fallen_out[0] if self.streamed else hold_out(texts, name)
        except InputError as error:
            raise InputError(f"{error} or set eval.domain") from None
        return _documents_of(held)

    @cached_property
    def _fallen_out(self) -> tuple[set[str], float]:
        return self._fallen(self.recipe.domain)

    def _fallen(self, sources: Sequence[Source]) -> tuple[set[str], float]:
        """Return the first held-out documents of each source, read as a stream, and the share that is held out."""
        streams = []
        for source in sources:
            summary = SourceSummary(source, self.recipe.malformed_rows)
            texts = map(partial(summary.take, read=self._text), reader(source).records())
            streams.append(text for text in texts if text is not None)
        return hold_out_of_streams(streams, ", ".join(source.path for source in sources), HELD_OUT_OF_A_STREAM)

    @cached_property
    def streamed(self) -> bool:
        """Return whether training reads its documents during training."""
        wanted = self.recipe.tune.streaming
        mixed = any(source.share is not None for source in self.trained_on)
        if mixed and wanted is False:
            raise InputError("tune.streaming=false: a source's share of the tokens needs a stream: leave streaming out, or give weights")
        if wanted is not None or mixed:
            return wanted or mixed
        return sum(files.bytes for source in self.trained_on if (files := source_files(source))) > STREAM_ABOVE

    @property
    def trained_on(self) -> tuple[Source, ...]:
        if not self.recipe.domain:
            raise InputError("domain is missing: give it as domain=file or in the recipe")
        replay = self.recipe.tune.replay
        return self.recipe.domain if replay is None else (*self.recipe.domain, replay)

    def held_out(self, limit: int | None) -> list[Record]:
        return by_hash(self._held_out)[:limit]

    @cached_property
    def _purposes(self) -> set[str]:
        """Return the texts with another purpose than training; of a stream's held-out documents only those that are measured."""
        parts, general = self.probe, self.recipe.eval.general
        further = [record for records in self._further.values() for record in records]
        probe = self._texts([*parts.scoring, *parts.steering, *parts.reporting, *further])
        return probe | self._texts(self._held_out) | (set() if general is None else self._texts(self._records("eval", general)))

    @cached_property
    def _training(self) -> TrainingText:
        documents, weights = list(self._documents), np.array([source.weight for source in self.trained_on], dtype=np.float64)
        if self.recipe.tune.replay is not None:
            documents += self._texts_to_train_on(len(self.recipe.domain))
        held = {record.content["text"] for record in self._held_out}
        kept = []
        for text, number in documents:
            if text in self._purposes:
                self._trained[number].serves_elsewhere(HELD if self.recipe.eval.domain is None and text in held else MEASURED)
            else:
                kept.append((text, number))
        if not kept:
            raise InputError("domain: every document is held out or stands in the probe or eval.general: none is left to train on")
        sources = np.array([number for _, number in kept])
        return TrainingText([text for text, _ in kept], weights[sources], tuple(self._trained), sources)

    @cached_property
    def _stream(self) -> StreamedText:
        share = self._fallen_out[1] if self.recipe.eval.domain is None else 0.0
        purposes = {hashlib.sha256(text.encode()).digest() for text in self._purposes if not is_held_out(text, share)}

        def keep(text: str) -> bool:
            return hashlib.sha256(text.encode()).digest() not in purposes and not is_held_out(text, share)

        excluded = hashlib.sha256(b"".join(sorted(purposes)) + str(share).encode()).hexdigest()
        recipe = self.recipe
        return StreamedText(self.trained_on, keep, excluded, recipe.tune.shuffle_window, recipe.malformed_rows, recipe.special_tokens)

    def training(self) -> TrainingText | StreamedText:
        """Return the domain and replay documents that serve no other purpose."""
        return self._stream if self.streamed else self._training

    def items(self, records: Iterable[Record], style: str = "plain") -> list[Item]:
        """Tokenise probe records. Leaves out and counts those that are too long for the model."""
        records, limit = list(records), self.source.positions
        vocabulary = self.source.vocabulary(records)
        found = tokenize(records, self.source.encoder, limit=limit, overlong="drop", style=style, vocabulary=vocabulary)
        self.source.encoder.warn_of_control_tokens("probe")
        if not found.items:
            raise InputError(f"{self.recipe.probe.path}: no item with supervised tokens fits the model's {limit} positions")
        if left := len(records) - len(found.items):
            logger.warning(f"{left} of {len(records)} probe items are left out: too long for the model, or nothing supervised")
        return found.items

    def _texts(self, records: Sequence[Record]) -> set[str]:
        texts = (self._text(record) for record in records if not is_tokenised(record))
        return {text for text in texts if text is not None}

    def _with_text(self, records: Sequence[Record], column: str | None) -> list[Record]:
        """Return the records that have text in `column`, with it under "text"."""
        return [Record({"text": self._text(record)}, record.where) for record in records] if column else list(records)


def _documents_of(held: set[str]) -> list[Record]:
    return [Record({"text": text}, "held-out document") for text in sorted(held)]
