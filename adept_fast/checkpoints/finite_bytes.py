"""Whether the bytes of a tensor are numbers: no NaN or infinity goes into a checkpoint that this package writes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from adept_fast.checkpoints.safetensors_index import BUFFER, Stored
from adept_fast.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def all_finite(content: bytearray | memoryview, dtype: str) -> bool:
    """Of whole elements of a dtype of safetensors; integers always are, and 8 bits and less are not looked at."""
    return dtype not in DTYPES or not len(content) or bool(torch.frombuffer(content, dtype=DTYPES[dtype]).isfinite().all())


def require_finite(stored: Iterable[Stored], way_out: str) -> None:
    """Raise InputError for the first tensor on disk that holds a NaN or infinity. Constant memory."""
    for tensor in stored:
        if tensor.dtype in DTYPES:
            with tensor.file.open("rb", buffering=0) as stream:
                stream.seek(tensor.start)
                for at in range(0, tensor.size, BUFFER):
                    content = bytearray(min(BUFFER, tensor.size - at))
                    if stream.readinto(content) != len(content):
                        raise InputError(f"{tensor.file}: corrupt or truncated: it became shorter while it was read")
                    if not all_finite(content, tensor.dtype):
                        raise not_finite(tensor, way_out)


def not_finite(tensor: Stored, way_out: str) -> InputError:
    return InputError(f"{tensor.file}: {tensor.name} holds NaN or infinity: {way_out}")
