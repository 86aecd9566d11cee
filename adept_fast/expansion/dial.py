"""The dial: the share alpha of what training made of the copies. 0 is the base, exactly; 1 the tuned model, bit for bit.

A copy is silent by the values v of its output projections (0) or of the gains after them (0, or -1 where the norm multiplies by 1 + w), and
becomes alpha w + (1 - alpha) v: each branch adds alpha times what it computes from its input. The result is a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.checkpoints.adept_config import AdeptConfig, record_of
from adept_fast.checkpoints.byte_copy import Piece
from adept_fast.checkpoints.safetensors_index import Stored
from adept_fast.expansion.edit_checkpoint import open_expanded, source_config, write_remade
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor
from adept_fast.models import describe, unwrapped
from adept_fast.settings.validation import Range, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_alpha(alpha: float) -> float:
    require("alpha", alpha, float, Range(0))
    return float(alpha)


def dialled(tensor: Tensor, silent: float, alpha: float) -> Tensor:
    """alpha w + (1 - alpha) v in the tensor's dtype, rounded once from fp64; exactly v at 0 and w at 1."""
    if alpha == 1:
        return tensor
    return torch.full_like(tensor, silent) if alpha == 0 else (alpha * tensor.double() + (1 - alpha) * silent).to(tensor.dtype)


def dial(
    source: str | Path,
    target: str | Path,
    alpha: float,
    *,
    verify: bool = True,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write the tuned checkpoint `source` with its copies at the share `alpha` to the folder `target`; returns the record.

    Its selection.alpha says what the copies have by now of their training. Raises InputError for an alpha below 0.
    """
    alpha = check_alpha(alpha)
    on_disk, record = open_expanded(source, trust_remote_code, verify)
    make = None if alpha == 1 else partial(_turned, on_disk, alpha)
    layers = [Layer(index, make if index in record.copies else None) for index in range(on_disk.count)]
    share = alpha * record.selection.get("alpha", 1.0)
    turned = replace(record, selection={**record.selection, "alpha": share})
    return write_remade(target, on_disk, layers, source_config(on_disk, record, record.inserted), turned, record.source, verify, quiet)


def _turned(on_disk: OnDisk, alpha: float, stored: Stored, name: str) -> Piece:
    silent = on_disk.fill(stored)
    if silent is None:
        return Piece(name, stored.dtype, stored.shape, stored)
    return Piece(name, stored.dtype, stored.shape, made=lambda: as_bytes(dialled(as_tensor(stored), silent, alpha)))


@contextmanager
def dialled_model(model: PreTrainedModel, alpha: float) -> Iterator[None]:
    """The same in memory, for the time being: the model's copies at the share `alpha`, with the bits that `dial` would write."""
    model, alpha = unwrapped(model), check_alpha(alpha)
    family, record = describe(model), record_of(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for layer in record.copies:
                for name, silent in family.silent[layer].items():
                    tensor = tensors[f"{family.layers}.{layer}.{name}"]
                    kept[f"{family.layers}.{layer}.{name}"] = tensor.clone()
                    tensor.copy_(dialled(tensor, silent, alpha))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                tensors[name].copy_(tensor)
