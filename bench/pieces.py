"""Compare the loss on first and later pieces of documents in training blocks, with and without the begin-of-text tokens.

Without these tokens blocks are cut wherever they are full, and later pieces begin in mid-text. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from adept_fast.checkpoints import checkpoint
from adept_fast.data.documents import Documents, document_tokens
from adept_fast.data.encoding import Encoder
from adept_fast.data.packing import Blocks
from adept_fast.data.readers import reader
from adept_fast.data.sources import Source
from adept_fast.data.templates import document_text
from adept_fast.tuning.piece_losses import piece_losses, pieces_of
from bench import parser


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("pieces", __doc__)
    options.add_argument("--model", required=True, help="a checkpoint folder or hub name")
    options.add_argument("--text", required=True, help="a file of documents")
    options.add_argument("--blocks", type=int, default=32, help="how many blocks, from the file's beginning")
    options.add_argument("--block-size", type=int, default=256, help="tokens of a block")
    given = options.parse_args(argv)
    folder = checkpoint.resolve(given.model)
    model, encoder = checkpoint.load_model(folder, dtype="float32"), Encoder(checkpoint.load_tokenizer(folder))
    documents, started = _documents(given, encoder), time.perf_counter()
    found = {}
    for name, begin in (("without", np.zeros(0, np.int32)), ("with", documents.begin)):
        blocks = Blocks(Documents(documents.ids, documents.starts, begin), np.arange(len(documents)), given.block_size)
        first, later = kinds = ([], [])
        for item, goes_on in pieces_of(blocks, given.blocks):
            if item.supervised:
                kinds[goes_on].append(item)
        measured = piece_losses(model, first, later)
        tokens = [sum(item.supervised for item in kind) for kind in kinds]
        whole = (measured.first * tokens[0] + measured.later * tokens[1]) / sum(tokens)
        found[name] = {**vars(measured), "first_tokens": tokens[0], "later_tokens": tokens[1], "all": whole}
    begin = encoder.tokenizer.convert_ids_to_tokens(encoder.begin)
    return {**vars(given), "begin": begin, **found, "threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - started, 1)}


def _documents(given: argparse.Namespace, encoder: Encoder) -> Documents:
    """Read as many documents as fill the blocks."""
    made, records = [], reader(Source(given.text)).records()
    while sum(map(len, made)) < (given.blocks + 1) * given.block_size and (record := next(records, None)):
        made += document_tokens([document_text(record)], encoder)
    return Documents(np.concatenate(made), np.cumsum([0, *map(len, made)]), np.array(encoder.begin, np.int32))
