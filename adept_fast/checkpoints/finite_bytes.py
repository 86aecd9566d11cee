"""Check the bytes of tensors: this package writes no NaN or infinity into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from adept_fast.checkpoints.safetensors_index import Stored
from adept_fast.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def all_finite(content: bytearray | memoryview, dtype: str) -> bool:
    """Whether whole elements of a safetensors dtype are finite. Integers and dtypes of 8 bits or less pass unchecked."""
    return dtype not in DTYPES or not len(content) or bool(torch.frombuffer(content, dtype=DTYPES[dtype]).isfinite().all())


def require_finite(stored: Iterable[Stored], way_out: str) -> None:
    """Raise InputError for the first tensor on disk that holds NaN or infinity. Takes constant memory."""
    for tensor in stored:
        if tensor.dtype in DTYPES and not all(all_finite(block, tensor.dtype) for block in tensor.blocks()):
            raise not_finite(tensor, way_out)


def not_finite(tensor: Stored, way_out: str) -> InputError:
    return InputError(f"{tensor.file}: {tensor.name} holds NaN or infinity: {way_out}")
