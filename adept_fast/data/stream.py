"""Stream packed blocks from sources larger than memory, in one order, resumable at any block.

Documents of a source are shuffled within windows of as many documents as fit in memory, by a permutation drawn from (seed, source, pass,
window). Sources are interleaved deterministically by their share of the tokens. Each document comes from the source that is furthest
behind: credit_i += share_i * n for a document of n tokens, credit_chosen -= n. So every share is met to within one document. Blocks are cut
from the documents in that order.

The state behind a block holds, for each source, the position at the window's start, pass, window, index in the window, and a digest of the
texts read; and the shares, the credits, the tokens drawn, and the tokens of the last document still to be packed, with their begin tokens.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from adept_fast.data.documents import Documents
from adept_fast.data.encoding import Encoder
from adept_fast.data.packing import Blocks, Cut, Piece, packed
from adept_fast.data.shuffled_source import ShuffledSource
from adept_fast.data.streamed_text import StreamedText
from adept_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stream(Dataset[dict[str, Any]]):
    """Blocks of a run by number, as of `Blocks`: input_ids, labels and position_ids, each int64 [block_size].

    Blocks are made in order; asking for an earlier one makes those in between again. So each process may ask for its own part, and all see
    one global order.

    ahead: number of blocks whose state is kept
    """

    def __init__(
        self,
        text: StreamedText,
        mixture: Sequence[tuple[float, float]],
        tokenizer: PreTrainedTokenizerBase | Encoder,
        *,
        blocks: int,
        block_size: int,
        seed: int,
        pad_token: int = 0,
        one_per_row: bool = False,
        ahead: int = 1024,
    ) -> None:
        if block_size < 2:
            raise InputError(f"block_size must be 2 or more, found {block_size}: a block of one token has nothing to predict")
        self.block_size, self.pad_token, self.one_per_row = block_size, pad_token, one_per_row
        self.encoder = encoder = text.encoder(tokenizer)
        self._blocks, self._mixture = blocks, np.array(mixture, dtype=np.float64)
        self._sources = [ShuffledSource(source, number, text, encoder, seed) for number, source in enumerate(text.sources)]
        self._credit, self._drawn = np.zeros(len(self._sources)), np.zeros(len(self._sources), np.int64)
        self._begin_tokens = np.array(encoder.begin, np.int32)
        self._cut, self._rest, self._at = Cut(block_size, len(encoder.begin)), Piece(np.zeros(0, np.int32)), 0
        self._begin = self._snapshot()
        self._states: deque[dict[str, Any]] = deque([self._begin], maxlen=ahead + 1)

    def __len__(self) -> int:
        return self._blocks

    @property
    def annealed(self) -> bool:
        """Whether the shares of the sources change over the run, and so depend on its length."""
        return bool((self._mixture[:, 0] != self._mixture[:, 1]).any())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        if index < self._at:
            while len(self._states) > 1 and self._states[-1]["block"] > index:
                self._states.pop()
            self._go_to(self._before(index))
        while self._at < index:
            self._next_block()
        return packed(self._next_block(), self.block_size, self.pad_token)

    def state(self, block: int) -> dict[str, Any]:
        """Return a JSON-like state from which the stream resumes at `block`, or a few blocks before it."""
        kept = self._before(block)
        return json.loads(json.dumps({**kept, "rest": np.asarray(kept["rest"]).tolist(), "shares": self._mixture.tolist()}))

    def drawn(self, block: int) -> dict[str, float]:
        """Return each source's share of the tokens drawn for the blocks before `block`, by path, and split if given."""
        tokens = self._before(block)["drawn"]
        shares: dict[str, float] = {}
        for shuffled, count in zip(self._sources, tokens, strict=True):
            name = ":".join(filter(None, (shuffled.source.path, shuffled.source.split)))
            shares[name] = shares.get(name, 0) + count / max(1, sum(tokens))
        return shares

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Resume from a state. Returns the paths of sources that have changed ahead of it.

        Raises InputError for a state of other sources, and for a source that has changed before it.
        """
        if len(state["sources"]) != len(self._sources):
            found = f"{len(state['sources'])} sources, the recipe {len(self._sources)}"
            raise InputError(f"the checkpoint's stream has {found}: delete the checkpoint")
        changed = [source.source.path for source, kept in zip(self._sources, state["sources"], strict=True) if source.resume(kept)]
        if state["shares"] != self._mixture.tolist():
            raise InputError(
                f"{', '.join(changed) or 'domain'}: changed, and with it each source's share of all tokens, by which this run has drawn: "
                "bring back what it was to go on, or choose another output_dir"
            )
        self._go_to({**state, "sources": [source.state() for source in self._sources]})
        self._states.clear()
        self._states.append(self._snapshot())
        return changed

    def head(self, documents: int = 64) -> Blocks:
        """Return the first documents as separate blocks, for a preview."""
        here = self._snapshot()
        self._go_to(self._begin)
        made = [self._next_document() for _ in range(documents)]
        self._go_to(here)
        starts = np.concatenate([[0], np.cumsum([len(document) for document in made])])
        found = Documents(np.concatenate(made), starts, self._begin_tokens)
        return Blocks(found, np.arange(documents), self.block_size, self.pad_token, self.one_per_row)

    def first_pieces(self, blocks: int) -> Iterator[tuple[Piece, bool]]:
        """Yield each piece of the first `blocks` blocks, and whether it continues a document. The stream's position does not change."""
        here, kept = self._snapshot(), self._states.copy()
        self._go_to(self._begin)
        try:
            for _ in range(min(blocks, self._blocks)):
                yield from ((piece, piece.continues) for piece in self._next_block())
        finally:
            self._states = kept
            self._go_to(here)

    def _go_to(self, state: Mapping[str, Any]) -> None:
        for source, kept in zip(self._sources, state["sources"], strict=True):
            source.load(kept)
        self._credit, self._drawn = np.array(state["credit"]), np.array(state["drawn"], np.int64)
        rest, inserted = np.array(state["rest"], np.int32), int(state.get("inserted", 0))
        self._rest, self._at = Piece(rest, inserted, continues=inserted == len(self._begin_tokens)), int(state["block"])

    def _before(self, block: int) -> dict[str, Any]:
        return next((kept for kept in reversed(self._states) if kept["block"] <= block), self._begin)

    def _snapshot(self) -> dict[str, Any]:
        sources = [source.state() for source in self._sources]
        counts = {"credit": self._credit.tolist(), "drawn": self._drawn.tolist()}
        return {"block": self._at, "sources": sources, **counts, "rest": self._rest.ids, "inserted": self._rest.inserted}

    def _next_document(self) -> np.ndarray:
        progress = self._at / max(1, self._blocks - 1)
        share = self._mixture[:, 0] + (self._mixture[:, 1] - self._mixture[:, 0]) * progress
        chosen = int(np.where(share > 0, self._credit + share, -np.inf).argmax())
        document = self._sources[chosen].next()
        self._credit += share * len(document)
        self._credit[chosen] -= len(document)
        self._drawn[chosen] += len(document)
        return document

    def _next_block(self) -> list[Piece]:
        pieces: list[Piece] = []
        begun = [source.passes for source in self._sources]
        while not any(map(_has_targets, pieces)):  # a block of single tokens has no target
            pieces, room = [], self.block_size
            while room and not (pieces and self.one_per_row):
                if not len(self._rest):
                    self._rest = Piece(self._next_document())
                    for source, passes in zip(self._sources, begun, strict=True):
                        if source.passes > passes + 1 and not any(map(_has_targets, (*pieces, self._rest))):
                            raise InputError(f"{source.source.path}: a whole pass over it holds no document of two tokens or more")
                if not (count := self._cut(len(self._rest), room)):
                    break
                piece, self._rest = self._rest.divided(count, self._begin_tokens)
                pieces.append(piece)
                room -= count
        self._at += 1
        self._states.append(self._snapshot())
        return pieces


def _has_targets(piece: Piece) -> bool:
    return len(piece) - piece.inserted > 1
