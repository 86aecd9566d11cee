"""Text that is read while training: its sources, the texts to train on, their counts, and each source's share."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from adept_fast.data.documents import BATCH, cache_folder, document_tokens
from adept_fast.data.encoding import Encoder
from adept_fast.data.readers import Reader, reader
from adept_fast.data.source_files import source_files
from adept_fast.data.source_summary import ELSEWHERE, SourceSummary
from adept_fast.data.sources import Source
from adept_fast.data.templates import document_text
from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.input_files import read_json
from adept_fast.runtime.provenance import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keep = Callable[[str], bool]


@dataclass(frozen=True)
class StreamedText:
    """Sources to stream.

    keep: whether to train on a text
    excluded: a digest of the texts that `keep` excludes
    window: documents that are shuffled together
    malformed_rows: limit of each source's SourceSummary
    special_tokens: as of Encoder
    """

    sources: tuple[Source, ...]
    keep: Keep
    excluded: str
    window: int
    malformed_rows: int | None = None
    special_tokens: str = "text"

    @property
    def digest(self) -> str:
        """Digest everything that determines the stream's documents and their order, except the seed."""
        return self._digest([reader(source).identity() for source in self.sources])

    @property
    def settings_digest(self) -> str:
        """Do the same without the sources' contents, which the stream's state compares as far as they were read."""
        return self._digest([None] * len(self.sources))

    def _digest(self, identities: Sequence[str | None]) -> str:
        keys = ("split", "column", "weight", "share", "share_end")
        described = [(*(getattr(source, key) for key in keys), *written(source)) for source in self.sources]
        return digest([[(found, *keys) for found, keys in zip(identities, described, strict=True)], self.excluded, self.window])

    def texts(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | Encoder,
        summary: SourceSummary | None = None,
        reading: Reader | None = None,
    ) -> Iterator[str]:
        """Yield the texts of a source to train on. reading: a reader, to start from its position; summary: counts what is left out."""
        summary, encoder = summary or self._summary(source), self.encoder(tokenizer)
        for record in (reading or reader(source)).records():
            text = summary.take(record, lambda record: document_text(record, encoder.tokenizer))
            if text is not None and self.keep(text):
                yield text
            elif text is not None:
                summary.serves_elsewhere(ELSEWHERE)

    def encoder(self, tokenizer: PreTrainedTokenizerBase | Encoder) -> Encoder:
        """Return the encoder for the texts."""
        return tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer, self.special_tokens)

    def _summary(self, source: Source) -> SourceSummary:
        return SourceSummary(source, self.malformed_rows, source_files(source))

    def count(self, tokenizer: PreTrainedTokenizerBase | Encoder) -> list[tuple[int, int]]:
        """Count (documents, tokens) of each source. Counts are cached by what they were made from."""
        encoder = self.encoder(tokenizer)
        found = [self._look(source, encoder, counted=True) for source in self.sources]
        return [(int(summary.documents or 0), int(summary.tokens or 0)) for summary in found]

    def summaries(self, tokenizer: PreTrainedTokenizerBase | Encoder) -> list[SourceSummary]:
        """Summarise each source in one pass over its files, so that a malformed row is found before the first step. Cached like counts.

        A dataset from the hub is not read, unless its tokens are counted.
        """
        encoder = self.encoder(tokenizer)
        return [self._look(source, encoder, counted=False) for source in self.sources]

    def _look(self, source: Source, encoder: Encoder, counted: bool) -> SourceSummary:
        described = encoder.describe().decode(errors="replace"), str(encoder.tokenizer.chat_template)
        made_from = digest([reader(source).identity(), source.column, source.template, self.excluded, *described])
        summary, folder = self._summary(source), cache_folder()
        tokens, looked = folder / "counts" / f"{made_from}.json", folder / "looks" / f"{made_from}.json"
        if cached := next((path for path in (tokens, *([] if counted else [looked])) if path.is_file()), None):
            summary.restore(read_json(cached))
            summary.check()
            encoder.found.update(summary.control_tokens)
        elif counted:
            texts, summary.tokens, before = self.texts(source, encoder, summary), 0, encoder.found.copy()
            while batch := list(islice(texts, BATCH)):
                summary.tokens += sum(map(len, document_tokens(batch, encoder)))
            summary.control_tokens = dict(encoder.found - before)
            write_json(tokens, summary.counts())
        elif summary.files is None and not os.path.isdir(source.file):
            summary.documents = None
        else:
            deque(self.texts(source, encoder, summary), maxlen=0)
            write_json(looked, summary.counts())
        return summary


def written(source: Source) -> tuple[str, ...]:
    """Return the source's template for digests; empty for the default."""
    return () if source.template == "plain" else (source.template,)


def shares(sources: Sequence[Source], tokens: Sequence[int] | None) -> list[tuple[float, float]]:
    """Return the (start, end) share of each source. Sources without one divide the rest in proportion to weight x tokens.

    tokens: of each source; needed if two or more have no share

    Raises InputError for shares that do not add up to 1.
    """
    ends = [(source.share, source.share if source.share_end is None else source.share_end) for source in sources]
    given = [None if start is None or end is None else (start, end) for start, end in ends]
    left = [1 - sum(share[end] for share in given if share is not None) for end in (0, 1)]
    rest = [index for index, share in enumerate(given) if share is None]
    if min(left) < -1e-9 or (max(left) > 1e-9 and not rest):
        found = " and ".join(f"{1 - value:.3g}" for value in left)
        raise InputError(f"sources: their shares make {found} at the start and the end of the run, not 1", "sources")
    parts = [sources[index].weight * (tokens[index] if tokens is not None else 1) for index in rest]
    if rest and not sum(parts):
        raise InputError(f"{', '.join(sources[index].path for index in rest)}: no token to train on, or weights of 0")
    divided = iter([(left[0] * part / sum(parts), left[1] * part / sum(parts)) for part in parts])
    return [next(divided) if share is None else share for share in given]
