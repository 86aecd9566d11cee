"""The tuned checkpoint: the expanded one's bytes with the trained tensors of a model in memory, in the dtypes that stand on disk."""

from __future__ import annotations

from collections.abc import Mapping
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
from adept_fast.expansion.edit_checkpoint import open_expanded, write_remade
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor
from adept_fast.runtime.input_files import read_json


def export_tuned(
    expanded: str | Path,
    target: str | Path,
    state: Mapping[str, Tensor],
    *,
    inputs: Mapping[str, Any] | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write the checkpoint `expanded` with the trained copies of `state` to the folder `target`; returns the record.

    state: name in memory -> tensor, of any float dtype, on any device; all tensors of the copies that were trained. What else it holds
    must be what `expanded` holds, in that dtype: ExpansionError names a tensor that training reached and must not. Nothing but copies
    passes through memory, so that shards, dtypes and tensors stored twice stay as they are. inputs: for the record.
    """
    on_disk, record = open_expanded(expanded, trust_remote_code)
    trained, found = set(record.trained), _OnDiskNames(on_disk, state)
    for stored in on_disk.shards.tensors.values():
        tensor = found.of(stored)
        if on_disk.naming.layer(stored.name) in trained:
            if stored.dtype in DTYPES and (tensor is None or tuple(tensor.shape) != stored.shape):
                raise InputError(f"{target}: {stored.name} is not among the trained tensors: give the state of the whole copies")
        elif tensor is not None and stored.dtype in DTYPES and not as_tensor(stored).to(tensor.dtype).equal(tensor.cpu()):
            raise ExpansionError(f"training changed {stored.name}, which it must not touch")

    def make(stored: Stored, name: str) -> Piece:
        tensor = found.of(stored)
        if tensor is None or stored.dtype not in DTYPES:
            return Piece(name, stored.dtype, stored.shape, stored)
        return Piece(name, stored.dtype, stored.shape, made=lambda: as_bytes(tensor.detach().cpu().to(DTYPES[stored.dtype])))

    layers = [Layer(index, make if index in trained else None) for index in range(on_disk.count)]
    config = read_json(on_disk.folder / "config.json")
    made = replace(record, inputs=dict(inputs or {}))
    return write_remade(target, on_disk, layers, config, made, record.source, verify=True, quiet=quiet)


class _OnDiskNames:
    """The tensors of a state by what they are called on disk, where transformers' conversions are reverted."""

    def __init__(self, on_disk: OnDisk, state: Mapping[str, Tensor]) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self.naming, self.state = on_disk.naming, state
        plain = self.naming.plain
        merged = {name: tensor for name, tensor in state.items() if name not in plain}
        parted = revert_weight_conversion(on_disk.skeleton, merged) if merged else {}
        names = Naming(on_disk.skeleton, on_disk.family.layers, parted)
        self.parted = {names.place(name): tensor for name, tensor in parted.items()}

    def of(self, stored: Stored) -> Tensor | None:
        """The tensor that `stored` became in memory, or the part of one."""
        parameter = self.naming.plain_parameter(stored.name)
        return self.state.get(parameter) if parameter else self.parted.get(self.naming.place(stored.name))
