"""Tables of 64-bit words about tensors, groups and chunks for the kernels of adamw.py, cached on the device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import WORD, WORDS, group_rows
from adept_fast.ops.adamw.eight_bit import BLOCK, scale_count
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import ROW_BYTES, Table

CACHED_TABLES = 64
RESERVED_WORDS = 2**17  # of pinned memory


class Setup(NamedTuple):
    """The dtypes and mode of one compiled kernel."""

    param: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    mode: str | None
    amsgrad: bool


_cache: dict[tuple[str, torch.device, int, int], tuple[bytes, Tensor]] = {}
_captured: list[tuple[Tensor, Tensor]] = []  # (pinned, table): captured graphs copy from one to the other at every replay
_reserve = torch.empty(0, dtype=torch.int64)


def by_setup(table: Table) -> tuple[array[int], list[tuple[Setup, int]]]:
    """Sort rows by set-up. Returns the rows, and (set-up, number of its rows) in the same order."""
    found: dict[Setup, list[int]] = {}
    for i, u in enumerate(table.updates):
        mode = None if u.param.dtype == torch.float32 else u.options.master_weights
        setup = Setup(u.param.dtype, u.grad.dtype, u.exp_avg.dtype, mode, u.max_exp_avg_sq is not None)
        found.setdefault(setup, []).append(i)
    rows = table.rows
    if len(found) > 1:
        content = rows.tobytes()
        rows = array("q", b"".join(content[ROW_BYTES * i : ROW_BYTES * (i + 1)] for part in found.values() for i in part))
    return rows, [(setup, len(part)) for setup, part in found.items()]


def tensors_on(device: torch.device, rows: array[int], updates: Sequence[Update]) -> Tensor:
    def words() -> Tensor:
        assert all(u.param.device == device and u.step.device == device and u.step.dtype == torch.float32 for u in updates)
        return torch.frombuffer(rows, dtype=torch.int64)

    return _on_device("tensors", rows.tobytes(), words, device)


def groups_on(device: torch.device, options: Sequence[AdamWOptions]) -> Tensor:
    """Upload the rows of groups. lr and betas given as tensors that kernels cannot read are converted to numbers."""

    def readable(x: float | Tensor) -> float | Tensor:
        there = isinstance(x, Tensor) and x.device == device and x.dtype in (torch.float32, torch.float64)
        return x if there else float(x)

    rows = group_rows([o._replace(lr=readable(o.lr), beta1=readable(o.beta1), beta2=readable(o.beta2)) for o in options])
    return _on_device("groups", rows, lambda: torch.frombuffer(bytearray(rows), dtype=torch.int64), device)


def slots_of(rows: array[int]) -> array[int]:
    """Return the elements of each tensor, or with 8-bit moments those that its blocks have room for."""
    numels, lengths = rows[WORD.numel :: WORDS], rows[WORD.row :: WORDS]
    if not any(lengths):
        return numels
    return array("q", [scale_count(n, length) * BLOCK if length else n for n, length in zip(numels, lengths, strict=True)])


def chunks_on(device: torch.device, slots: array[int], size: int) -> Tensor:
    """Upload one word per chunk of `size` slots: its tensor + 2^32 * its number in the tensor."""

    def words() -> Tensor:
        counts = (torch.frombuffer(slots, dtype=torch.int64) + size - 1) // size
        tensors = torch.arange(len(slots)).repeat_interleave(counts)
        parts = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
        return tensors + (parts << 32)

    return _on_device(f"chunks of {size}", slots.tobytes(), words, device)


def _on_device(kind: str, content: bytes, words: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Upload words() without synchronisation, or return the cached table of equal `content` on this stream."""
    global _reserve
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    key = (kind, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0, len(content))
    held = _cache.get(key)
    if held is not None and held[0] == content and not capturing:
        return held[1]
    source = words()
    if not on_gpu:
        table = source.clone()
    elif capturing and _reserve.numel() >= source.numel():
        # Older torch releases cannot pin memory during a capture.
        pinned, _reserve = _reserve[: source.numel()].copy_(source), _reserve[source.numel() :]
        table = pinned.to(device, non_blocking=True)
    else:
        pinned = torch.empty(source.shape, dtype=torch.int64, pin_memory=True).copy_(source)
        table = pinned.to(device, non_blocking=True)
    if capturing:
        _captured.append((pinned, table))
        return table
    if on_gpu and _reserve.numel() < 4 * source.numel() + RESERVED_WORDS // 2:
        _reserve = torch.empty(8 * source.numel() + RESERVED_WORDS, dtype=torch.int64, pin_memory=True)
    if len(_cache) >= CACHED_TABLES:
        del _cache[next(iter(_cache))]
    _cache[key] = (content, table)
    return table
