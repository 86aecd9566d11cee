"""AdamW on NVIDIA GPUs through adept_fast._CUDA. Untested on a GPU."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast import _CUDA
from adept_fast.ops.adamw.descriptors import group_rows
from adept_fast.ops.adamw.reference import AdamWOptions
from adept_fast.ops.adamw.table import Table

CACHED_BYTES = 64 * 2**20


class Sent(NamedTuple):
    """A table in device memory. chunks: of each update kernel."""

    memory: Tensor
    chunks: list[int]


# Least recently used first. A table is written once, and allocated and used on one stream: its memory is therefore reused only after every
# launch that reads it.
_tables: dict[tuple[int, int, bytes], Sent] = {}  # by device, stream and rows
_lock = Lock()


def adamw(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Backend "cuda": see adept_fast.ops.adamw.op. Launches on the current stream, without synchronisation.

    The device reads `grad_scale`, `found_inf`, and lr and betas given as tensors, when the launches run.
    The table of tensors is uploaded only when it changes, as launch parameters, so that no host memory must outlive the call.

    A captured CUDA graph includes the upload, into a table in the graph's own memory pool. It can be replayed while its tensors exist:
    parameters, gradients, states, `grad_scale`, `found_inf`, tensor lr and betas. Numbers (lr, betas, eps, weight_decay) are captured
    by value.
    """
    device = table.columns.param[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        # Referenced until the launches are queued: from then on their memory is reused in stream order.
        groups = [_readable(o, device) for o in table.options]
        sent = _uploaded(table, device, stream, table.recurs and not torch.cuda.is_current_stream_capturing())
        _CUDA.adamw_step(
            device.index, stream, sent.memory.data_ptr(), len(table), sent.chunks, group_rows(groups), _address(grad_scale),
            _address(found_inf),
        )  # fmt: skip


def _readable(options: AdamWOptions, device: torch.device) -> AdamWOptions:
    """Convert lr and betas to numbers or to tensors that kernels on `device` can read."""

    def readable(value: float | Tensor) -> float | Tensor:
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "cpu":
            return value.item()
        there = value.device == device and value.dtype in (torch.float32, torch.float64)
        return value if there else value.to(device, torch.float64)

    return options._replace(lr=readable(options.lr), beta1=readable(options.beta1), beta2=readable(options.beta2))


def _address(scalar: Tensor | None) -> int:
    return 0 if scalar is None else scalar.data_ptr()


def _uploaded(table: Table, device: torch.device, stream: int, cached: bool) -> Sent:
    """Return the cached table of the same rows, or upload a new one. cached: False during a capture, whose memory belongs to the graph."""
    rows = table.rows.tobytes()
    key = (device.index, stream, rows)
    with _lock:
        found = _tables.pop(key, None) if cached else None
        if found is not None:
            _tables[key] = found
            return found
    elsewhere = [step.device for step in table.columns.step if step.device != device]
    if elsewhere:
        raise RuntimeError(f"`step` is on {elsewhere[0]}, its parameter on {device}; move it there, as the kernel advances it")
    chunks, size = _CUDA.adamw_table_size(rows)
    sent = Sent(torch.empty(size, dtype=torch.uint8, device=device), chunks)
    _CUDA.adamw_write_table(device.index, stream, sent.memory.data_ptr(), chunks, rows)
    if cached:
        with _lock:
            _tables[key] = sent
            while sum(each.memory.nbytes for each in _tables.values()) > CACHED_BYTES and len(_tables) > 1:
                del _tables[next(iter(_tables))]
    return sent
