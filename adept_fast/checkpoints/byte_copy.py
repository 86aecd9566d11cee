"""Write safetensors files from byte ranges of other files, which the kernel copies without passing them through memory."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

from adept_fast.checkpoints.finite_bytes import all_finite
from adept_fast.checkpoints.safetensors_index import BITS, BUFFER, LARGEST_HEADER, Stored
from adept_fast.errors import InputError

AT_ONCE = 1 << 26  # bytes per copying call; between two the progress bar moves and an interrupt is seen
NOT_IN_KERNEL = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})  # other file systems, older kernels


@dataclass(frozen=True)
class Piece:
    """A tensor to write: the bytes of a stored one, one element's bytes (`fill`) repeated, or the bytes that `made` returns."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Stored | None = None
    fill: bytes = b""
    made: Callable[[], bytes] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.numel * BITS[self.dtype] // 8

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yield the content of a piece that is not stored, in parts."""
        if self.made:
            made = self.made()
            if not all_finite(bytearray(made), self.dtype):
                raise InputError(f"{self.name} would hold NaN or infinity as {self.dtype}: nothing is written: take another dtype or share")
            yield made
            return
        block = memoryview(self.fill * (BUFFER // len(self.fill)))
        for at in range(0, self.size, len(block)):
            yield block[: self.size - at]


def write_shards(
    folder: Path, plan: Mapping[str, Sequence[Piece]], metadata: Mapping[str, Mapping[str, str]], progress: Callable[[int], object]
) -> None:
    """Write safetensors files into `folder`, in constant memory. The caller calls fsync.

    plan: file name -> pieces; wider dtypes are written first, so that every tensor is aligned, otherwise in this order
    metadata: file name -> metadata of its header
    progress: called with the number of bytes written
    """
    for file, pieces in plan.items():
        with (folder / file).open("wb") as stream:
            _write(stream, folder / file, pieces, metadata.get(file, {}), progress)


def _write(
    stream: BufferedWriter, target: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], progress: Callable[[int], object]
) -> None:
    ordered = sorted(pieces, key=lambda piece: -BITS[piece.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for piece in ordered:
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [at, at + piece.size]}
        at += piece.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise InputError(f"{target}: a header of {len(text)} bytes is more than safetensors files may have")
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.flush()
    for file, start, size, piece in _ranges(ordered):
        if file is not None:
            _copy(file, start, size, stream.fileno(), progress)
            continue
        for block in piece.blocks():
            stream.write(block)
            progress(len(block))
        stream.flush()
        _begin(stream.fileno(), size)


def _ranges(pieces: Iterable[Piece]) -> list[tuple[Path | None, int, int, Piece]]:
    """Return (file, start, size, first piece) of each range to write.

    Pieces that are adjacent in their file are joined into one range. A piece that is not stored has no file.
    """
    ranges: list[tuple[Path | None, int, int, Piece]] = []
    for piece in pieces:
        if piece.stored is None:
            ranges.append((None, 0, piece.size, piece))
            continue
        file, start, size = piece.stored.file, piece.stored.start, piece.stored.size
        if ranges and ranges[-1][0] == file and ranges[-1][1] + ranges[-1][2] == start:
            ranges[-1] = (file, ranges[-1][1], ranges[-1][2] + size, ranges[-1][3])
        else:
            ranges.append((file, start, size, piece))
    return ranges


def _copy(file: Path, start: int, size: int, target: int, progress: Callable[[int], object]) -> None:
    """Append `size` bytes of `file` to the descriptor, in the kernel if it can, else through a buffer."""
    with file.open("rb", buffering=0) as source:
        in_kernel, left = hasattr(os, "copy_file_range"), size
        while left:
            copied = 0
            if in_kernel:
                try:
                    copied = os.copy_file_range(source.fileno(), target, min(left, AT_ONCE), start)
                except OSError as error:
                    if error.errno not in NOT_IN_KERNEL:
                        raise
            if not copied:
                in_kernel = False
                block = os.pread(source.fileno(), min(left, BUFFER), start)
                if not block:
                    raise InputError(f"{file}: corrupt or truncated: it became shorter while it was copied")
                copied = os.write(target, block)
            start, left = start + copied, left - copied
            progress(copied)
            _begin(target, copied)


def _begin(target: int, size: int) -> None:
    """Let the disk start writing the last `size` bytes, so that fsync waits less. Linux starts when told that pages are not needed."""
    if hasattr(os, "posix_fadvise"):
        end = os.lseek(target, 0, os.SEEK_CUR)
        os.posix_fadvise(target, end - size, size, os.POSIX_FADV_DONTNEED)
