"""Identify a checkpoint by a digest of its tensors, independent of sharding, and of its config and tokenizer files.

A digest is written "xxh3_128:hex". It distinguishes checkpoints and detects corruption, but not deliberate forgery. xxh3_128 runs at the
speed of memory, sha256 at a tenth of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from adept_fast.checkpoints.finite_bytes import all_finite, not_finite
from adept_fast.checkpoints.safetensors_index import Stored, open_shards

KIND = "xxh3_128:"
IDENTITY = ("config.json", "tokenizer", "vocab", "merges", "chat_template", "added_tokens", "special_tokens")  # prefixes of file names
THREADS = min(4, os.cpu_count() or 1)
IN_CACHE = 1 << 18  # bytes read at once, so that they are hashed while in the CPU's cache


def tensors_digest(tensors: Mapping[str, Stored], threads: int = THREADS, finite: Container[str] = ()) -> str:
    """Compute a digest over (name, dtype, shape, digest of the bytes) of each tensor, in the order of names, in `threads` threads.

    finite: names of stored tensors that must be finite; InputError is raised for one that is not
    """

    def of(stored: Stored) -> str:
        digest = xxhash.xxh3_128()
        for block in stored.blocks(IN_CACHE):
            digest.update(block)
            if stored.name in finite and not all_finite(block, stored.dtype):
                raise not_finite(stored, "it cannot be proven or trained: fetch the model again")
        return digest.hexdigest()

    in_place = sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].start))
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(in_place, pool.map(of, map(tensors.__getitem__, in_place)), strict=True))
    total = xxhash.xxh3_128()
    for name in sorted(tensors):
        total.update(f"{json.dumps([name, tensors[name].dtype, tensors[name].shape, digests[name]])}\n".encode())
    return KIND + total.hexdigest()


def identity(folder: Path, tensors: str) -> str:
    """Compute a digest over config, tokenizer files and the digest of the tensors."""
    digest = xxhash.xxh3_128(f"{tensors}\n".encode())
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix == ".model" or file.name.startswith(IDENTITY)):
            digest.update(f"{file.name}:{xxhash.xxh3_128(file.read_bytes()).hexdigest()}\n".encode())
    return KIND + digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """Compute the identity of a checkpoint: equal for equal tensors, config and tokenizer."""
    return identity(folder, tensors_digest(open_shards(folder).tensors))
