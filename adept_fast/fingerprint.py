"""What identifies a checkpoint: sha256 over its tensors, whatever shards they lie in, and over the files that say how to use them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adept_fast.shards import BUFFER, Stored, open_shards

IDENTITY = ("config.json", "tokenizer", "vocab", "merges", "chat_template", "added_tokens", "special_tokens")  # beginnings of names
THREADS = min(4, os.cpu_count() or 1)


def tensors_sha256(tensors: Mapping[str, Stored], threads: int = THREADS) -> str:
    """sha256 over (name, dtype, shape, sha256 of the bytes) of each tensor, in the order of names; hashed `threads` at a time."""
    in_place = sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].start))
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(in_place, pool.map(_sha256, map(tensors.__getitem__, in_place)), strict=True))
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{json.dumps([name, tensors[name].dtype, tensors[name].shape, digests[name]])}\n".encode())
    return total.hexdigest()


def _sha256(stored: Stored) -> str:
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(min(BUFFER, stored.size))), stored.size
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        while left and (count := stream.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def identity(folder: Path, tensors: str) -> str:
    """sha256 over config, tokenizer files and the digest of the tensors."""
    digest = hashlib.sha256(f"{tensors}\n".encode())
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix == ".model" or file.name.startswith(IDENTITY)):
            digest.update(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """What identifies a source: the same for the same tensors, config and tokenizer."""
    return identity(folder, tensors_sha256(open_shards(folder).tensors))
