"""safetensors files as bytes: headers and indexes, read and checked in full.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). A checkpoint is model.safetensors, or the shards that model.safetensors.index.json lists.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.runtime.input_files import open_input, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, as the format's own readers have it
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BUFFER = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor's place: `size` bytes at `start` of `file`."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self) -> bytearray:
        content = bytearray(self.size)
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            if stream.readinto(content) != self.size:
                raise InputError(f"{self.file}: corrupt or truncated: it became shorter while it was read")
        return content


@dataclass(frozen=True)
class Shards:
    """The weights of a checkpoint. files: file name -> its tensors, by offset; metadata: file name -> the header's own; index: what the
    index holds beside weight_map, None for a checkpoint of one file."""

    folder: Path
    files: Mapping[str, tuple[Stored, ...]]
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    index: Mapping[str, Any] | None = None

    @property
    def tensors(self) -> dict[str, Stored]:
        return {stored.name: stored for entries in self.files.values() for stored in entries}


def _shown(name: object) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_header(file: Path) -> tuple[tuple[Stored, ...], dict[str, str]]:
    """The tensors of a safetensors file, by offset, and its metadata. Raises InputError unless the header agrees with the file."""

    def corrupt(reason: str) -> InputError:
        return InputError(f"{file}: corrupt or truncated ({reason}): fetch it again")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise corrupt(f"its header has {_shown(next(name for name in names if names.count(name) > 1))} twice")
        return content

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
        header = json.loads(text.decode(), object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers beyond what Python reads, too deeply nested
        raise corrupt(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise corrupt("its header is not valid Unicode") from None
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt("its metadata is not text")
    data = 8 + length
    tensors = sorted((_stored(file, name, entry, data, corrupt) for name, entry in header.items()), key=lambda s: (s.start, s.size))
    end = data
    for stored in tensors:
        if stored.start != end:
            raise corrupt(f"the bytes of {_shown(stored.name)} do not follow those before it")
        end += stored.size
    if end != total:
        raise corrupt(f"its tensors end at byte {end}, the file at {total}")
    return tuple(tensors), metadata


def _stored(file: Path, name: str, entry: Any, data: int, corrupt: Callable[[str], InputError]) -> Stored:
    def natural(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(f"{_shown(name)} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(f"{_shown(name)} has the unknown dtype {_shown(dtype)}")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2:
        raise corrupt(f"{_shown(name)} has a malformed shape or data_offsets")
    size = offsets[1] - offsets[0]
    if size < 0 or math.prod(shape) * BITS[dtype] != 8 * size:
        raise corrupt(f"{_shown(name)} has {size} bytes, not those of {dtype} {_shown(shape)}")
    return Stored(file, name, dtype, tuple(shape), data + offsets[0], size)


def weight_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """Names of a checkpoint's safetensors files, and its index, checked, if it has one."""
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
            raise InputError(f"{index}: {_shown(name)} stands in {_shown(file)}, which is no .safetensors beside it: fetch it again")
        if file not in present:
            raise InputError(f"{index}: its shard {_shown(file)} is missing: fetch the checkpoint again")
    return sorted(set(shards.values())), content


def open_shards(folder: Path) -> Shards:
    """The weights of a checkpoint folder. Raises InputError for a file that is missing or corrupt, or that the index contradicts."""
    names, index = weight_files(folder)
    files: dict[str, tuple[Stored, ...]] = {}
    metadata: dict[str, dict[str, str]] = {}
    homes: dict[str, str] = {}
    for file in names:
        files[file], metadata[file] = read_header(folder / file)
        for stored in files[file]:
            if stored.name in homes:
                raise InputError(f"{folder / file}: {_shown(stored.name)} stands in {homes[stored.name]} too: fetch the checkpoint again")
            homes[stored.name] = file
    if index is None:
        return Shards(folder, files, metadata)
    listed = index.pop("weight_map")
    wrong = sorted(name for name in {*listed, *homes} if listed.get(name) != homes.get(name))
    if wrong:
        where = f"in {homes[wrong[0]]}" if wrong[0] in homes else "nowhere"
        raise InputError(f"{folder / INDEX}: {_shown(wrong[0])} stands {where}, unlike the index has it: fetch the checkpoint again")
    return Shards(folder, files, metadata, index)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Whether two tensors have the same bits. Constant memory."""
    if one.size != other.size:
        return False
    with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
        for at in range(0, one.size, BUFFER):
            length = min(BUFFER, one.size - at)
            if os.pread(first.fileno(), length, one.start + at) != os.pread(second.fileno(), length, other.start + at):
                return False
    return True
