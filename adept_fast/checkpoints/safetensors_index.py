"""Read and check the headers and indexes of safetensors files.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). A checkpoint is model.safetensors, or the shards that model.safetensors.index.json lists.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.input_files import open_input, read_json
from adept_fast.runtime.strict_json import loads
from adept_fast.settings.validation import shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BUFFER = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: `size` bytes at `start` of `file`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> memoryview:
        return next(self.blocks(self.size), memoryview(bytearray()))

    def blocks(self, at_once: int = BUFFER) -> Iterator[memoryview]:
        """Yield the tensor's bytes, `at_once` at a time, in one buffer that the next block overwrites."""
        buffer, left = memoryview(bytearray(min(at_once, self.size))), self.size
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                block = buffer[:left]
                if stream.readinto(block) != len(block):
                    raise InputError(f"{self.file}: corrupt or truncated: it became shorter while it was read")
                yield block
                left -= len(block)


@dataclass(frozen=True)
class Shards:
    """The weights of a checkpoint.

    files: file name -> its tensors, by offset
    metadata: file name -> metadata of its header
    index: the index without weight_map; None for a checkpoint of one file
    """

    folder: Path
    files: Mapping[str, tuple[Stored, ...]]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> dict[str, Stored]:
        return {stored.name: stored for entries in self.files.values() for stored in entries}


def read_header(file: Path) -> tuple[tuple[Stored, ...], dict[str, str]]:
    """Return the tensors of a safetensors file, by offset, and its metadata. Raises InputError unless the header agrees with the file."""

    def corrupt(reason: str) -> InputError:
        return InputError(f"{file}: corrupt or truncated ({reason}): fetch it again")

    try:
        with open_input(file) as stream:
            total = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > min(total - 8, LARGEST_HEADER):
                raise corrupt(f"a header of {length} bytes in a file of {total}")
            text = stream.read(length)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    try:
        header = loads(text.decode())
        json.dumps(header, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except ValueError as error:
        raise corrupt(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt("its metadata is not text")
    data = 8 + length
    tensors = sorted((_stored(file, name, entry, data, corrupt) for name, entry in header.items()), key=lambda s: (s.start, s.size))
    end = data
    for stored in tensors:
        if stored.start != end:
            raise corrupt(f"the bytes of {shown(stored.name)} do not follow those before it")
        end += stored.size
    if end != total:
        raise corrupt(f"its tensors end at byte {end}, the file at {total}")
    return tuple(tensors), metadata


def _stored(file: Path, name: str, entry: Any, data: int, corrupt: Callable[[str], InputError]) -> Stored:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(f"{shown(name)} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(f"{shown(name)} has the unknown dtype {shown(dtype)}")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2:
        raise corrupt(f"{shown(name)} has a malformed shape or data_offsets")
    size = offsets[1] - offsets[0]
    if size < 0 or math.prod(shape) * BITS[dtype] != 8 * size:
        raise corrupt(f"{shown(name)} has {size} bytes, not those of {dtype} {shown(shape)}")
    return Stored(file, name, dtype, tuple(shape), data + offsets[0], size)


def weight_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """Return the names of a checkpoint's safetensors files, and its checked index, if any."""
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS], None
    if (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    content = read_json(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: holds no weight_map: fetch the checkpoint again")
    if not isinstance(content.get("metadata"), dict):
        raise InputError(f"{index}: holds no metadata, without which transformers does not load it: fetch the checkpoint again")
    present = set(os.listdir(folder))
    for name, file in shards.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {shown(name)} stands in {shown(file)}, which is no .safetensors beside it: fetch it again")
        if file not in present:
            raise InputError(f"{index}: its shard {shown(file)} is missing: fetch the checkpoint again")
    return sorted(set(shards.values())), content


def open_shards(folder: Path) -> Shards:
    """Read the headers of a checkpoint. Raises InputError for a file that is missing or corrupt, or that the index contradicts."""
    names, index = weight_files(folder)
    files: dict[str, tuple[Stored, ...]] = {}
    metadata: dict[str, dict[str, str]] = {}
    homes: dict[str, str] = {}
    for file in names:
        files[file], metadata[file] = read_header(folder / file)
        for stored in files[file]:
            if stored.name in homes:
                raise InputError(f"{folder / file}: {shown(stored.name)} stands in {homes[stored.name]} too: fetch the checkpoint again")
            homes[stored.name] = file
    if index is None:
        return Shards(folder, files, metadata)
    listed = index.pop("weight_map")
    wrong = sorted(name for name in {*listed, *homes} if listed.get(name) != homes.get(name))
    if wrong:
        where = f"in {homes[wrong[0]]}" if wrong[0] in homes else "nowhere"
        raise InputError(f"{folder / INDEX}: {shown(wrong[0])} stands {where}, unlike the index has it: fetch the checkpoint again")
    return Shards(folder, files, metadata, index)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same bits. Takes constant memory."""
    return one.size == other.size and all(bytes(a) == bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))
