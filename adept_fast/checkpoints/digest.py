"""What identifies a checkpoint: a digest of its tensors, whatever shards they lie in, and of the files that say how to use them.

A digest is written "kind:hex". It tells one checkpoint from another and finds what went wrong on the way; it is no protection from somebody
who wants two to look alike. xxh3_128 does that at the speed of memory, sha256 at a tenth of it; records of earlier versions have sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import xxhash

from adept_fast.checkpoints.finite_bytes import all_finite, not_finite
from adept_fast.checkpoints.safetensors_index import Stored, open_shards
from adept_fast.errors import InputError


class Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


KINDS: Mapping[str, Callable[[], Hash]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
IDENTITY = ("config.json", "tokenizer", "vocab", "merges", "chat_template", "added_tokens", "special_tokens")  # beginnings of names
THREADS = min(4, os.cpu_count() or 1)
IN_CACHE = 1 << 18  # bytes read at once: they are hashed before they leave the cache


def kind_of(digest: str) -> str:
    """The kind of a digest. Raises InputError for one that is not known."""
    kind = str(digest).partition(":")[0]
    if kind not in KINDS:
        raise InputError(f"the record's digest {ascii(digest)[:80]} is of none of the kinds {', '.join(KINDS)}: expand the model again")
    return kind


def tensors_digest(
    tensors: Mapping[str, Stored], kind: str = "xxh3_128", threads: int = THREADS, finite: Container[str] = ()
) -> str:
    """Digest over (name, dtype, shape, digest of the bytes) of each tensor, in the order of names; `threads` are hashed at a time.

    finite: names, as stored, of tensors that must hold numbers: looked at while their bytes are in cache. Raises InputError for a NaN.
    """

    def of(stored: Stored) -> str:
        digest, buffer, left = KINDS[kind](), memoryview(bytearray(min(IN_CACHE, stored.size))), stored.size
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            while left and (count := stream.readinto(buffer[: min(left, len(buffer))])):
                digest.update(buffer[:count])
                if stored.name in finite and not all_finite(buffer[:count], stored.dtype):
                    raise not_finite(stored, "it cannot be proven or trained: fetch the model again")
                left -= count
        return digest.hexdigest()

    in_place = sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].start))
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(in_place, pool.map(of, map(tensors.__getitem__, in_place)), strict=True))
    total = KINDS[kind]()
    for name in sorted(tensors):
        total.update(f"{json.dumps([name, tensors[name].dtype, tensors[name].shape, digests[name]])}\n".encode())
    return f"{kind}:{total.hexdigest()}"


def identity(folder: Path, tensors: str) -> str:
    """Digest over config, tokenizer files and the digest of the tensors."""
    digest = xxhash.xxh3_128(f"{tensors}\n".encode())
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix == ".model" or file.name.startswith(IDENTITY)):
            digest.update(f"{file.name}:{xxhash.xxh3_128(file.read_bytes()).hexdigest()}\n".encode())
    return f"xxh3_128:{digest.hexdigest()}"


def fingerprint(folder: Path) -> str:
    """What identifies a source: the same for the same tensors, config and tokenizer."""
    return identity(folder, tensors_digest(open_shards(folder).tensors))
