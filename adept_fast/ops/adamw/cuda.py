"""AdamW on NVIDIA GPUs through adept_fast._CUDA. Untested on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adept_fast import _CUDA
from adept_fast.ops.adamw.descriptors import group_rows
from adept_fast.ops.adamw.reference import AdamWOptions, Update
from adept_fast.ops.adamw.table import Table

# LRU cache: (device, stream, rows) -> (table in device memory, chunks). A table is written once, and allocated and used on one stream:
# its memory is therefore reused only after every launch that reads it.
_TABLES: dict[tuple[int, int, bytes], tuple[Tensor, int]] = {}
_CACHED_TABLES = 16


def adamw(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Backend "cuda": see adept_fast.ops.adamw.op. Makes two launches on the current stream, without synchronisation.

    The device reads `grad_scale`, `found_inf`, and lr and betas given as tensors, when the launches run.
    The table of tensors is uploaded only when it changes, as launch parameters, so that no host memory must outlive the call.

    A captured CUDA graph includes the upload, into a table in the graph's own memory pool. It can be replayed while its tensors exist:
    parameters, gradients, states, `grad_scale`, `found_inf`, tensor lr and betas. Numbers (lr, betas, eps, weight_decay) are captured
    by value.
    """
    updates = table.updates
    device = updates[0].param.device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        # Referenced until the launches are queued: from then on their memory is reused in stream order.
        groups = [_readable(o, device) for o in table.options]
        sent, chunks = _uploaded(updates, table.rows.tobytes(), device, stream)
        _CUDA.adamw_step(
            device.index, stream, sent.data_ptr(), len(updates), chunks, group_rows(groups), _address(grad_scale), _address(found_inf)
        )


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


def _uploaded(updates: Sequence[Update], rows: bytes, device: torch.device, stream: int) -> tuple[Tensor, int]:
    """Return the cached (table, chunks) or upload a new one. During a capture it is always new, in the graph's memory pool."""
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device.index, stream, rows)
    known = None if capturing else _TABLES.pop(key, None)
    if known is None:
        elsewhere = [u.step.device for u in updates if u.step.device != device]
        if elsewhere:
            raise RuntimeError(f"`step` is on {elsewhere[0]}, its parameter on {device}; move it there, as the kernel advances it")
        chunks, size = _CUDA.adamw_table_size(rows)
        known = torch.empty(size, dtype=torch.uint8, device=device), chunks
        _CUDA.adamw_write_table(device.index, stream, known[0].data_ptr(), chunks, rows)
    if not capturing:
        _TABLES[key] = known
        while len(_TABLES) > _CACHED_TABLES:
            del _TABLES[next(iter(_TABLES))]
    return known
