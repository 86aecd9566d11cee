"""What adamw.py's kernels read about tensors, groups and chunks: tables of 64-bit words, kept on the device while they do not change."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from struct import pack
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw.descriptors import WORDS
from adept_fast.ops.adamw.planned_rows import Table
from adept_fast.ops.adamw.reference import AdamWOptions, Update

GROUP_WORDS = 10
MODES = {None: 0, "copy": 1, "remainder": 2, "kahan": 3, "stochastic": 4}
TABLES_KEPT = 64
RESERVED_WORDS = 2**17  # of pinned memory


class Setup(NamedTuple):
    """What one compiled kernel serves."""

    param: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    mode: str | None
    amsgrad: bool


_kept: dict[tuple[str, torch.device, int, int], tuple[bytes, Tensor]] = {}
_captured: list[tuple[Tensor, Tensor]] = []  # what graphs copy from and to at every replay
_reserve = torch.empty(0, dtype=torch.int64)


def by_setup(table: Table) -> tuple[array[int], list[tuple[Setup, int]]]:
    """(rows of the table, those of a set-up together; set-ups with their number of rows, in that order)."""
    found: dict[tuple[torch.dtype, torch.dtype, torch.dtype, str | None, bool], list[int]] = {}
    for i, u in enumerate(table.updates):
        setup = (u[0].dtype, u[1].dtype, u[2].dtype, u[12].master_weights, u[4] is not None)
        if setup in found:
            found[setup].append(i)
        else:
            found[setup] = [i]
    rows = table.rows
    if len(found) > 1:
        content = rows.tobytes()
        rows = array("q", b"".join(content[8 * WORDS * i : 8 * WORDS * (i + 1)] for part in found.values() for i in part))
    setups = [(Setup(*setup[:3], None if setup[0] == torch.float32 else setup[3], setup[4]), len(part)) for setup, part in found.items()]
    return rows, setups


def tensors_on(device: torch.device, rows: array[int], updates: Sequence[Update]) -> Tensor:
    """`rows` on the device."""

    def words() -> Tensor:
        assert all(u.param.device == device and u.step.device == device and u.step.dtype == torch.float32 for u in updates)
        return torch.frombuffer(rows, dtype=torch.int64)

    return _on_device("tensors", rows.tobytes(), words, device)


def groups_on(device: torch.device, options: Sequence[AdamWOptions]) -> Tensor:
    """A row: lr, beta1, beta2, eps, weight_decay, maximize (fp64), addresses of lr, beta1 and beta2 where they are tensors on the device,
    and which are (2 bits each; fp32 1, fp64 2)."""
    rows = bytearray()
    for o in options:
        numbers, addresses, kinds = [], [], 0
        for i, x in enumerate(o[:3]):
            kind = 0
            if isinstance(x, Tensor):
                kind = 1 if x.dtype == torch.float32 else 2 if x.dtype == torch.float64 else 0
                kind = kind if x.device == device else 0
            numbers.append(0.0 if kind else float(x))
            addresses.append(x.data_ptr() if kind else 0)
            kinds |= kind << 2 * i
        rows += pack("6d4q", *numbers, o.eps, o.weight_decay, o.maximize, *addresses, kinds)
    return _on_device("groups", bytes(rows), lambda: torch.frombuffer(rows, dtype=torch.int64), device)


def chunks_on(device: torch.device, numels: array[int], size: int) -> Tensor:
    """One word per chunk of `size` elements: the tensor it is in, and 2^32 times its number there."""

    def words() -> Tensor:
        counts = (torch.frombuffer(numels, dtype=torch.int64) + size - 1) // size
        tensors = torch.arange(len(numels)).repeat_interleave(counts)
        parts = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
        return tensors + (parts << 32)

    return _on_device(f"chunks of {size}", numels.tobytes(), words, device)


def _on_device(kind: str, content: bytes, words: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The table that `content` stands for; copied there without waiting, unless this stream holds it from an earlier call."""
    global _reserve
    on_gpu = device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    key = (kind, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0, len(content))
    held = _kept.get(key)
    if held is not None and held[0] == content and not capturing:
        return held[1]
    source = words()
    if not on_gpu:
        table = source.clone()
    elif capturing and _reserve.numel() >= source.numel():
        # Older releases of torch cannot pin memory during a capture.
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
    if len(_kept) >= TABLES_KEPT:
        del _kept[next(iter(_kept))]
    _kept[key] = (content, table)
    return table
