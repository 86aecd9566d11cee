"""Tokenise the documents of a training corpus, with a cache on disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from adept_fast.data.encoding import Encoder
from adept_fast.data.templates import Rendered
from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import staged_file
from adept_fast.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256  # documents per tokenizer call: enough to use its threads, few enough for a smooth progress bar


@dataclass(frozen=True)
class Documents:
    """Tokens of all documents end to end. Document i is ids[starts[i]:starts[i + 1]].

    ids: int32 [tokens]
    starts: int64 [documents + 1]
    begin: the tokens with which the tokenizer begins every text, int32; mostly BOS or none
    """

    ids: np.ndarray
    starts: np.ndarray
    begin: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])


@dataclass(frozen=True)
class WeightedDocuments:
    """Documents, and the number of passes over each per epoch."""

    documents: Documents
    weights: np.ndarray


def cache_folder() -> Path:
    """Create and return $ADEPT_FAST_CACHE, or adept_fast under $XDG_CACHE_HOME or ~/.cache. Raises InputError if that fails."""
    given = os.environ.get("ADEPT_FAST_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adept_fast"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{folder}: the cache cannot be kept there ({error.strerror}): set ADEPT_FAST_CACHE elsewhere") from None
    return folder


def tokenize_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | Encoder) -> Documents:
    """Tokenise each text and append EOS. The cache's key is a hash of texts and encoder, so an entry never becomes outdated."""
    encoder = Encoder.of(tokenizer)
    key = hashlib.sha256(encoder.describe())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest() + b"chat" * isinstance(text, Rendered))
    cached = cache_folder() / "tokens" / f"{key.hexdigest()}.safetensors"
    if cached.is_file():
        try:
            arrays = load_file(cached)
            encoder.count_control_tokens(texts)
            return Documents(arrays["ids"], arrays["starts"], arrays["begin"])
        except (SafetensorError, KeyError):
            cached.unlink(missing_ok=True)
    documents = _tokenize(texts, encoder)
    with staged_file(cached) as staging:
        save_file({"ids": documents.ids, "starts": documents.starts, "begin": documents.begin}, staging)
    return documents


def document_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | Encoder) -> list[np.ndarray]:
    """Tokenise each text, int32, with the tokenizer's begin tokens and EOS. A chat begins and ends as its template says.

    No text is too long: packing continues it in the next block.
    """
    encoder = Encoder.of(tokenizer)
    ends = [[] if isinstance(text, Rendered) else encoder.end for text in texts]
    return [
        np.asarray(ids if end and ids[-1:] == end else ids + end, dtype=np.int32)
        for ids, end in zip(encoder.texts(texts), ends, strict=True)
    ]


def _tokenize(texts: Sequence[str], encoder: Encoder) -> Documents:
    pieces: list[np.ndarray] = []
    with Progress(total=len(texts), desc="tokenising", unit="doc") as bar:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            pieces += document_tokens(batch, encoder)
            bar.update(len(batch))
    starts = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=starts[1:])
    return Documents(np.concatenate(pieces) if pieces else np.zeros(0, np.int32), starts, np.array(encoder.begin, np.int32))
