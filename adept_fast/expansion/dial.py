"""Scale how strongly the copies of a tuned model act, by alpha: 0 gives the base, 1 the tuned model, both bit for bit.

    w' = alpha w + (1 - alpha) v

w are the tensors that make a copy silent: its output projections, or the gains of the norms after them. v is their silent value: 0, or -1
where the norm multiplies by 1 + w. Each branch then adds alpha times its output. The result is a plain checkpoint.
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
from adept_fast.expansion.edit_checkpoint import open_expanded, source_config, write_edited
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor
from adept_fast.expansion.settings import ALPHA
from adept_fast.models.silent_copies import describe
from adept_fast.models.unwrap import unwrapped
from adept_fast.settings.validation import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dialled(tensor: Tensor, silent: float, alpha: float) -> Tensor:
    """Return alpha w + (1 - alpha) v in the tensor's dtype, rounded once from fp64; exactly v at 0 and w at 1."""
    if alpha == 1:
        return tensor
    return torch.full_like(tensor, silent) if alpha == 0 else (alpha * tensor.double() + (1 - alpha) * silent).to(tensor.dtype)


def dial(
    source: str | Path,
    target: str | Path,
    alpha: float,
    *,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write a tuned checkpoint whose copies act with strength `alpha` to a new folder.

    Args:
        source: the tuned checkpoint, a folder or hub name.
        target: the folder to write; it must not exist.
        alpha: 0 gives the base, 1 the tuned model; above 1 extrapolates.
        verify: compare every written tensor and the digest of the base; False leaves a note in the record.
        trust_remote_code: as in transformers.

    Returns:
        The record. `selection["alpha"]` is the product of all alphas applied so far.

    Raises:
        InputError: `alpha` is below 0 or not finite, or `source` has no record.
        ExpansionError: the original layers of `source` are not those of its base.

    >>> record = expand_checkpoint("base", "tuned", [1])
    >>> dial("tuned", "half", alpha=0.5).selection["alpha"]
    0.5
    """
    require("alpha", alpha, float, ALPHA)
    alpha = float(alpha)
    on_disk, record = open_expanded(source, trust_remote_code, verify)
    make = None if alpha == 1 else partial(_dialled_piece, on_disk, alpha)
    layers = [Layer(index, make if index in record.copies else None) for index in range(on_disk.count)]
    selection = {**record.selection, "alpha": alpha * record.selection.get("alpha", 1.0)}
    config = source_config(on_disk, record, record.inserted)
    return write_edited(target, on_disk, layers, config, replace(record, selection=selection), record.source, verify)


def _dialled_piece(on_disk: OnDisk, alpha: float, stored: Stored, name: str) -> Piece:
    silent = on_disk.fill(stored)
    if silent is None:
        return Piece(name, stored.dtype, stored.shape, stored)
    return Piece(name, stored.dtype, stored.shape, made=lambda: as_bytes(dialled(as_tensor(stored), silent, alpha)))


@contextmanager
def dialled_model(model: PreTrainedModel, alpha: float) -> Iterator[None]:
    """Scale the copies of a model in memory by `alpha` while inside, to the bits that `dial` would write."""
    require("alpha", alpha, float, ALPHA)
    model = unwrapped(model)
    family, record = describe(model), record_of(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in record.copies:
                for name, silent in family.silent[layer].items():
                    tensor = tensors[f"{family.layers}.{layer}.{name}"]
                    before.append((tensor, tensor.clone()))
                    tensor.copy_(dialled(tensor, silent, float(alpha)))
        yield
    finally:
        with torch.no_grad():
            for tensor, original in before:
                tensor.copy_(original)
