"""Write the tuned checkpoint: the expanded one's bytes, with the trained tensors of a model in memory, in the dtypes on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.byte_copy import Piece
from adept_fast.checkpoints.finite_bytes import DTYPES
from adept_fast.checkpoints.safetensors_index import Stored
from adept_fast.checkpoints.tensor_names import Naming
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.edit_checkpoint import open_expanded, write_edited
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor


def export_tuned(
    expanded: str | Path,
    target: str | Path,
    state: Mapping[str, Tensor],
    *,
    inputs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write the checkpoint `expanded` with the trained copies of `state` to the folder `target`, and return the record.

    state: name in memory -> tensor of any float dtype on any device, with all tensors of the trained copies. inputs: for the record.
    Only the copies pass through memory, so shards, dtypes and tensors that are stored twice stay as they are. Raises InputError where
    `state` lacks a trained tensor, ExpansionError where it holds another value for a tensor outside the copies.
    """
    on_disk, record = open_expanded(expanded, trust_remote_code)
    trained, tensor_of = set(record.trained), _state_on_disk(on_disk, state)
    for stored in on_disk.shards.tensors.values():
        tensor = tensor_of(stored)
        if on_disk.naming.layer(stored.name) in trained:
            if stored.dtype in DTYPES and (tensor is None or tuple(tensor.shape) != stored.shape):
                raise InputError(f"{target}: {stored.name} is not among the trained tensors: give the state of the whole copies")
        elif tensor is not None and stored.dtype in DTYPES and not as_tensor(stored).to(tensor.dtype).equal(tensor.cpu()):
            raise ExpansionError(f"training changed {stored.name}, which it must not touch")

    def make(stored: Stored, name: str) -> Piece:
        tensor = tensor_of(stored)
        if tensor is None or stored.dtype not in DTYPES:
            return Piece(name, stored.dtype, stored.shape, stored)
        return Piece(name, stored.dtype, stored.shape, made=lambda: as_bytes(tensor.detach().cpu().to(DTYPES[stored.dtype])))

    layers = [Layer(index, make if index in trained else None) for index in range(on_disk.count)]
    edited = replace(record, inputs=dict(inputs or {}))
    return write_edited(target, on_disk, layers, on_disk.source.config, edited, record.source, verify=True)


def _state_on_disk(on_disk: OnDisk, state: Mapping[str, Tensor]) -> Callable[[Stored], Tensor | None]:
    """Return what finds the tensor of `state` that belongs to a stored one: transformers merges some tensors on loading, so split them."""
    from transformers.core_model_loading import revert_weight_conversion

    naming = on_disk.naming
    merged = {name: tensor for name, tensor in state.items() if name not in naming.plain}
    split = revert_weight_conversion(on_disk.skeleton, merged) if merged else {}
    names = Naming(on_disk.skeleton, on_disk.family.layers, split)
    by_place = {names.place(name): tensor for name, tensor in split.items()}

    def tensor_of(stored: Stored) -> Tensor | None:
        parameter = naming.plain_parameter(stored.name)
        return state.get(parameter) if parameter else by_place.get(naming.place(stored.name))

    return tensor_of
