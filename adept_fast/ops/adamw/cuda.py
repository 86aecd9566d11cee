"""AdamW on NVIDIA GPUs through adept_fast._CUDA. Untested on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adept_fast import _CUDA
from adept_fast.ops.adamw.descriptors import group_rows
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import Table

# (device, stream, rows) -> (table in device memory, chunks), the latest used last. A table is written once, belongs to one stream's memory
# and is used on that stream alone: dropping it gives its memory back in stream order, after every launch that reads it.
_TABLES: dict[tuple[int, int, bytes], tuple[Tensor, int]] = {}
_KEPT = 16


def adamw(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Backend "cuda": see adept_fast.ops.adamw.op. Two launches on the current stream of the tensors' device, without synchronisation;
    lr and betas that are tensors there, `grad_scale` and `found_inf` are read by the device when the launches run.

    The rows about tensors are sent when they change, as launch parameters: no host memory must outlive the call. A captured CUDA graph
    holds those launches, and its memory pool the table that they fill, which no other call uses; a replay fills it again, so the graph
    may run as long as its own tensors (parameters, gradients, states, `grad_scale`, `found_inf`, tensor lr and betas) are there.
    Numbers (lr, betas, eps, weight_decay) are captured as they stand. On the host, for each stream, nothing is kept but the last tables.
    """
    updates = table.updates
    device = updates[0].param.device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        # Kept until the launches are queued, after which their memory can only be reused in stream order.
        groups = [_readable(o, device) for o in table.options]
        sent, chunks = _sent(updates, table.rows.tobytes(), device, stream)
        _CUDA.adamw_step(
            device.index, stream, sent.data_ptr(), len(updates), chunks, group_rows(groups), _address(grad_scale), _address(found_inf)
        )


def _readable(options: AdamWOptions, device: torch.device) -> AdamWOptions:
    """Turn lr and betas into numbers, or into tensors that kernels on `device` can read."""

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


def _sent(updates: Sequence[Update], rows: bytes, device: torch.device, stream: int) -> tuple[Tensor, int]:
    """Find the (table, chunks) sent before, or send a new one. Under capture it is new: the graph's pool keeps its memory."""
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device.index, stream, rows)
    known = None if capturing else _TABLES.pop(key, None)
    if known is None:
        elsewhere = [u.step.device for u in updates if u.step.device != device]
        if elsewhere:
            raise RuntimeError(f"`step` is on {elsewhere[0]}, its parameter on {device}; it must be there, where the kernel advances it")
        chunks, size = _CUDA.adamw_table_size(rows)
        known = torch.empty(size, dtype=torch.uint8, device=device), chunks
        _CUDA.adamw_write_table(device.index, stream, known[0].data_ptr(), chunks, rows)
    if not capturing:
        _TABLES[key] = known
        while len(_TABLES) > _KEPT:
            del _TABLES[next(iter(_TABLES))]
    return known
