"""Shuffle the documents of one source of a stream within windows, pass after pass, and keep a digest of those read.

Rows that a run has not read yet may be repaired; those it has read must not change. So the state holds a digest of the texts read, with the
current window, whose permutation depends on all its texts. If the source has changed, its texts are read again up to that point. Their
digest must match, and the position is determined anew, because a repair may move bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from adept_fast.data.documents import BATCH, document_tokens
from adept_fast.data.encoding import Encoder
from adept_fast.data.readers import reader
from adept_fast.data.source_summary import SourceSummary
from adept_fast.data.sources import Source
from adept_fast.data.streamed_text import StreamedText
from adept_fast.errors import InputError


class Read(NamedTuple):
    """The number of texts read, and a digest of all of them in order."""

    documents: int = 0
    digest: str = ""

    def then(self, texts: Sequence[str]) -> Read:
        sha = hashlib.sha256(self.digest.encode())
        for text in texts:
            sha.update(hashlib.sha256(text.encode()).digest())
        return Read(self.documents + len(texts), sha.hexdigest()) if texts else self


class ShuffledSource:
    """The documents of a source as tokens, one `next()` at a time. Its state has, beside the position,

    before: texts of this pass read before the current window
    through: those and the current window; None until the window is read
    whole: texts of a whole pass; None in the first pass
    """

    def __init__(self, source: Source, number: int, text: StreamedText, encoder: Encoder, seed: int) -> None:
        self.source, self.number, self.text, self.encoder, self.seed = source, number, text, encoder, seed
        self._summary = SourceSummary(source, text.malformed_rows)
        self._identity = reader(source).identity()
        begin = {"position": reader(source).position, "pass": 0, "window": 0, "index": 0}
        self._begin = {**begin, "before": Read(), "through": None, "whole": None, "malformed": {}}
        self.load(self._begin)

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of this source, which must not have changed."""
        self._start = {key: state[key] for key in ("position", "pass", "window", "malformed")}
        self._index, self._before = int(state["index"]), Read(*state["before"])
        self._through, self._whole = (None if state[key] is None else Read(*state[key]) for key in ("through", "whole"))
        self._summary.malformed = dict(state["malformed"])
        self._texts: list[str] | None = None
        self._tokens: tuple[int, list[np.ndarray]] = (0, [])
        self._open(self._start["position"])

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Resume from a saved state. Returns whether the source has changed ahead of it; raises InputError if it has changed before it."""
        changed = state["identity"] != self._identity
        self.load(self._relocate(state) if changed else state)
        return changed

    def state(self) -> dict[str, Any]:
        read = {"before": self._before, "through": self._through, "whole": self._whole}
        return {**self._start, "index": self._index, **read, "identity": self._identity}

    @property
    def passes(self) -> int:
        """Return the number of complete passes over the source."""
        return int(self._start["pass"])

    def next(self) -> np.ndarray:
        texts = self._texts or self._fill()
        if self._index == len(texts):
            assert self._through is not None  # the window was read
            self._before, self._through, self._index = self._through, None, 0
            self._begin_window(self._start["pass"], self._start["window"] + 1)
            texts = self._fill()
        first, batch = self._tokens
        if not first <= self._index < first + len(batch):
            first, batch = self._index, document_tokens(texts[self._index : self._index + BATCH], self.encoder)
            self._tokens = first, batch
        self._index += 1
        return batch[self._index - 1 - first]

    def _open(self, position: Mapping[str, Any] | None) -> None:
        self._reader = reader(self.source)
        if position is not None:
            self._reader.position = dict(position)
        self._ahead = self.text.texts(self.source, self.encoder, self._summary, self._reader)

    def _begin_window(self, number: int, window: int) -> None:
        self._start = {"position": self._reader.position, "pass": number, "window": window, "malformed": {**self._summary.malformed}}

    def _fill(self) -> list[str]:
        """Read and shuffle the window at the reader's position. At the end of the source start the next pass."""
        texts = self._read()
        if self._through not in (None, self._before.then(texts)):
            raise self._changed(self._through)
        if not texts:
            if self._whole not in (None, self._before):
                raise self._changed(self._whole, "all")
            self._whole, self._before = self._before, Read()
            self._open(None)
            self._begin_window(self._start["pass"] + 1, 0)
            texts = self._read()
        if not texts:
            raise InputError(f"{self.source.path}: holds no document to train on: every one is held out or serves to measure")
        self._through = self._before.then(texts)
        order = np.random.default_rng([self.seed, self.number, self._start["pass"], self._start["window"]]).permutation(len(texts))
        self._texts, self._tokens = [texts[index] for index in order], (0, [])
        return self._texts

    def _read(self) -> list[str]:
        return list(islice(self._ahead, self.text.window))

    def _relocate(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with the current position of its window. Raises InputError unless the texts read are the same."""
        self.load(self._begin)
        read = Read()
        for _ in range(state["window"]):
            read = read.then(self._read())
        self._begin_window(state["pass"], state["window"])
        found = [read]
        if state["through"] is not None:
            found.append(read := read.then(self._read()))
        if state["whole"] is not None:
            while texts := self._read():
                read = read.then(texts)
            found.append(read)
        expected = [Read(*state[key]) for key in ("before", "through", "whole") if state[key] is not None]
        if found != expected:
            raise self._changed(expected[-1], "the first" if state["whole"] is None else "all")
        return {**state, **self._start}

    def _changed(self, read: Read, part: str = "the first") -> InputError:
        return InputError(
            f"{self.source.path}: changed where this run has read it already ({part} {read.documents:,} documents): restore that to go on, "
            "as only what lies further on may be repaired; or choose another output_dir"
        )
