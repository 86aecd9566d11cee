"""The launches of csrc/adamw.cu on the CPU: the emulator in tests/cuda_emulator, in the place of adept_fast._CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import GROUP_WORDS, WORDS

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "cuda_emulator"
LAUNCH = re.compile(r"([\w()\[\]]+(?:<\w+>)?)<<<(.+?)>>>\(")
LAUNCHES = 4  # in csrc/adamw.cu


def build(folder: Path) -> ctypes.CDLL:
    """Compile the emulator with csrc/adamw.cu, whose launches become calls."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    source, found = LAUNCH.subn(r"emulator::launch(\1, \2)(", (ROOT / "csrc" / "adamw.cu").read_text(encoding="utf-8"))
    assert found == LAUNCHES
    (folder / "adamw.cpp").write_text(source, encoding="utf-8")
    includes = (f"-I{path}" for path in (EMULATOR, EMULATOR / "include", ROOT / "csrc"))
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *includes)
    target = folder / "emulated.so"
    subprocess.run([compiler, *flags, str(folder / "adamw.cpp"), str(EMULATOR / "cuda_emulator.cpp"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.take_faults.restype = ctypes.c_int64
    return library


def _integer(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


class EmulatedCuda:
    """The functions of adept_fast._CUDA over the emulator. It overwrites the memory of rows that a call was given."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.written: list[int] = []  # addresses of tables

    def adamw_table_size(self, rows: bytes) -> tuple[list[int], int]:
        chunks, size = (ctypes.c_int64 * 64)(), ctypes.c_int64()
        kernels = self.library.table_size(rows, _integer(len(rows) // (8 * WORDS)), chunks, ctypes.byref(size))
        return chunks[:kernels], size.value

    def adamw_write_table(self, device: int | None, stream: int, table: int, chunks: list[int], rows: bytes) -> None:
        self.written.append(table)
        with self._borrowed(rows) as memory:
            self._call("write_table", device or 0, _integer(stream), _integer(table), self._chunks(chunks), len(chunks), memory,
                       _integer(len(rows) // (8 * WORDS)))  # fmt: skip

    def adamw_step(
        self, device: int | None, stream: int, table: int, tensors: int, chunks: list[int], groups: bytes, grad_scale: int, found_inf: int
    ) -> None:
        with self._borrowed(groups) as memory:
            self._call("step", device or 0, _integer(stream), _integer(table), _integer(tensors), self._chunks(chunks), len(chunks), memory,
                       _integer(len(groups) // (8 * GROUP_WORDS)), _integer(grad_scale), _integer(found_inf))  # fmt: skip

    def counts(self) -> tuple[int, int, int]:
        """Return launches, 16-byte accesses and the bytes of the largest parameters since the last call."""
        found = (ctypes.c_int64 * 3)()
        self.library.take_counts(found)
        return found[0], found[1], found[2]

    def assert_no_faults(self) -> None:
        first = ctypes.create_string_buffer(256)
        faults = self.library.take_faults(first)
        assert faults == 0, first.value.decode()

    def _chunks(self, chunks: list[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(chunks))(*chunks)

    @contextlib.contextmanager
    def _borrowed(self, content: bytes) -> Iterator[ctypes.Array[ctypes.c_char]]:
        memory = ctypes.create_string_buffer(content, max(1, len(content)))
        yield memory
        ctypes.memset(memory, 0xEE, len(memory))

    def _call(self, name: str, *arguments: object) -> None:
        error = ctypes.create_string_buffer(256)
        if getattr(self.library, name)(*arguments, error):
            raise RuntimeError(error.value.decode())


class Arena:
    """Memory in which every access is checked to be inside of a tensor, and writes inside of one that is written."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self.library, self.used = library, 64
        self.memory = torch.empty(size, dtype=torch.uint8)
        library.set_arena(ctypes.c_size_t(self.memory.data_ptr()), ctypes.c_size_t(size))

    def placed(self, tensor: Tensor, shift: int, written: bool) -> Tensor:
        """Copy a tensor to `shift` elements after an aligned address."""
        size = tensor.numel() * tensor.itemsize
        begin = -(-self.used // 16) * 16 + shift * tensor.itemsize
        self.used = begin + size + 3
        copy = self.memory[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if size:
            self.library.allow(ctypes.c_size_t(copy.data_ptr()), ctypes.c_size_t(size), int(written))
        return copy

    def close(self) -> None:
        self.library.set_arena(ctypes.c_size_t(0), ctypes.c_size_t(0))


class Stream(types.SimpleNamespace):
    """What torch.cuda tells of the current stream."""

    cuda_stream = 0
    capturing = False


def patched_backend(monkeypatch: pytest.MonkeyPatch, native: EmulatedCuda, stream: Stream) -> ModuleType:
    """Import adept_fast.ops.adamw.cuda over the emulator, with tensors on the CPU."""
    monkeypatch.setitem(sys.modules, "adept_fast._CUDA", native)
    monkeypatch.setattr("adept_fast._CUDA", native, raising=False)
    monkeypatch.delitem(sys.modules, "adept_fast.ops.adamw.cuda", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    return importlib.import_module("adept_fast.ops.adamw.cuda")
