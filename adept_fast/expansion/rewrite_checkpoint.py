"""Write a checkpoint with other layers than the one it is made from: plan it tensor by tensor, copy from shard to shard, verify, rename.

Tensors that stay keep their shard and are copied as bytes. New tensors go to the shard of their template. Memory does not grow with the
model.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import KEY, AdeptConfig
from adept_fast.checkpoints.byte_copy import Piece, write_shards
from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.checkpoints.digest import THREADS, tensors_digest
from adept_fast.checkpoints.finite_bytes import DTYPES
from adept_fast.checkpoints.model_card import data_of, model_card, write_card
from adept_fast.checkpoints.safetensors_index import INDEX, Shards, Stored, open_shards, same_bytes
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.checkpoints.tensor_names import Naming
from adept_fast.errors import ExpansionError, InputError, UnsupportedFamilyError
from adept_fast.expansion.initialise import initial_values, silent_values
from adept_fast.models.decoder_layers import layers_path
from adept_fast.models.silent_copies import Family, describe
from adept_fast.runtime.atomic_files import staged_folder, write_json
from adept_fast.runtime.progress import Progress
from adept_fast.runtime.staging_folder import remove_leftovers
from adept_fast.runtime.strict_json import dumps, tagged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 1 << 24  # bytes left free for headers, config and record
Plan = dict[str, list[Piece]]  # file name -> its tensors
Record = TypeVar("Record", bound=AdeptConfig | None)  # None where no copy is left


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint on disk: its tensors and their names, the values that silence its layers, and the model without weights."""

    source: ModelFolder
    skeleton: PreTrainedModel
    family: Family
    naming: Naming

    @classmethod
    def open(cls, folder: str | os.PathLike[str], trust_remote_code: bool = False) -> OnDisk:
        """Read names and shapes, no weights.

        Raises InputError where config and tensors contradict each other, UnsupportedFamilyError where copies cannot be made silent.
        """
        source = ModelFolder.of(folder)
        skeleton = source.skeleton(trust_remote_code)
        with naming_folder(source.path):
            naming = Naming(skeleton, layers_path(skeleton), source.shards.tensors)
            naming.check(source.shards)  # before the model runs, so that a wrong shape is reported under its tensor's name
            family = describe(skeleton)
        return cls(source, skeleton, family, naming)

    @property
    def folder(self) -> Path:
        return self.source.path

    @property
    def shards(self) -> Shards:
        return self.source.shards

    @property
    def count(self) -> int:
        return self.naming.count

    def fill(self, stored: Stored) -> float | None:
        """Return the value that silences a layer's tensor; None for a tensor that a silent copy keeps."""
        layer = self.naming.layer(stored.name)
        return None if layer is None or layer >= self.count else self.naming.fill(stored.name, self.family.silent[layer])

    def copied(self, stored: Stored, name: str, how: str) -> Piece:
        """Plan the tensor of a new copy that corresponds to `stored`. how: the initialisation."""
        layer = self.naming.layer(stored.name)
        assert layer is not None
        names = dict(self.skeleton.get_submodule(f"{self.family.layers}.{layer}").named_parameters())
        value = self.naming.fill(stored.name, silent_values(self.family, layer, names, how))
        if value is None:
            return Piece(name, stored.dtype, stored.shape, stored)
        if not PRESERVING[how]:
            return Piece(name, stored.dtype, stored.shape, made=lambda: as_bytes(initial_values(as_tensor(stored), value, how, name)))
        return Piece(name, stored.dtype, stored.shape, fill=as_bytes(torch.tensor([value], dtype=DTYPES[stored.dtype])))

    def parameters(self, layers: Collection[int] | None = None) -> list[Stored]:
        """Return the stored tensors that the model's parameters are loaded from. layers: of these only; None takes all tensors."""
        found = [stored for stored in self.shards.tensors.values() if self.naming.of_parameter(stored.name)]
        return found if layers is None else [stored for stored in found if self.naming.layer(stored.name) in layers]

    def originals_digest(self, record: AdeptConfig | None, threads: int = THREADS, finite: Container[str] = ()) -> str:
        """Digest all tensors but the copies', under the names that they have in the source.

        finite: stored names of the tensors for which a NaN or infinity raises InputError.
        """
        if record is None:
            return tensors_digest(self.shards.tensors, threads, finite)
        places = {record.original(index): index for index in range(self.count - len(record.copies))}
        tensors = {}
        for name, stored in self.shards.tensors.items():
            layer = self.naming.layer(name)
            if layer is None:
                tensors[name] = stored
            elif layer >= self.count:
                tensors[self.naming.moved(name, layer - len(record.copies))] = stored
            elif layer in places:
                tensors[self.naming.moved(name, places[layer])] = stored
        return tensors_digest(tensors, threads, finite)


@dataclass(frozen=True)
class Layer:
    """A layer of the checkpoint to write.

    template: the layer whose names, shapes and shards it takes. make: (the template's tensor, the new name) -> the tensor to write; None
    writes the template's bytes.
    """

    template: int
    make: Callable[[Stored, str], Piece] | None = None


@contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Put the folder's name in front of an UnsupportedFamilyError, which speaks of a model in memory."""
    try:
        yield
    except UnsupportedFamilyError as refusal:
        raise UnsupportedFamilyError(f"{folder}: {refusal}") from None


def as_tensor(stored: Stored) -> Tensor:
    return torch.frombuffer(stored.read(), dtype=DTYPES[stored.dtype]).reshape(stored.shape) if stored.size else torch.empty(stored.shape)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plan_shards(source: OnDisk, layers: Sequence[Layer]) -> Plan:
    """Plan the tensors of each shard for a model of these layers. Tensors that stay come first, in their order."""
    indices: dict[int, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        indices[layer.template].append(index)
    plan: Plan = {}
    for file, tensors in source.shards.files.items():
        copied: list[Piece] = []
        new: list[Piece] = []
        for stored in tensors:
            at = source.naming.layer(stored.name)
            if at is None:
                copied.append(Piece(stored.name, stored.dtype, stored.shape, stored))
                continue
            for index in indices[at] if at < source.count else [at + len(layers) - source.count]:
                name, make = source.naming.moved(stored.name, index), layers[index].make if index < len(layers) else None
                if make is None:
                    copied.append(Piece(name, stored.dtype, stored.shape, stored))
                else:
                    new.append(make(stored, name))
        if copied or new:
            plan[file] = copied + new
    return plan


def write_checkpoint(
    target: Path,
    source: OnDisk,
    plan: Plan,
    config: Mapping[str, Any],
    record: Callable[[], Record],
    base: str,
    prove: Callable[[Path], None] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Record:
    """Write to the new folder `target`: the shards of `plan`, index, the source's other files, record, config.json, card, `extra`.

    record: called once the weights are written; its result is returned. base: the name of the model without copies, for the card. prove:
    called with the written folder before it gets its name. extra: further safetensors files. Raises InputError if the disk is too small or
    `target` exists. On any error `target` does not appear.
    """
    from safetensors.torch import save_file

    total = sum(piece.size for pieces in plan.values() for piece in pieces)
    require_space(target, total + sum(file.stat().st_size for file in checkpoint.carried(source.folder)))
    with staged_folder(target) as staging:
        with Progress(total=total, desc=f"writing {target.name}", unit="B", unit_scale=True, delay=2) as bar:
            write_shards(staging, plan, source.shards.metadata, bar.update)
        if source.shards.index is not None:
            write_json(staging / INDEX, _index(source, plan))
        checkpoint.carry_files(source.folder, staging)
        described = record()
        written = {key: value for key, value in config.items() if key != KEY}
        if described is not None:
            described.save(staging)
            written[KEY] = described.as_dict()
        trained = described is not None and "domain" in described.inputs and "merged" not in described.selection
        write_card(staging, model_card(base, source.source, described, data_of(source.folder) if trained else None))
        (staging / "config.json").write_text(dumps(tagged(written), indent=2) + "\n", encoding="utf-8")
        for name, tensors in (extra or {}).items():
            save_file(dict(tensors), staging / name)
        if prove:
            prove(staging)
    return described


def require_space(target: Path, size: int) -> None:
    """Make the parent folder of `target`, delete what killed processes left in it, and require `size` bytes of free space.

    Raises InputError where the disk is too small, or the folder cannot be made.
    """
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if folder == target.absolute().parent:
        remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if size + SPARE > free:
        raise InputError(f"{target}: needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk: make room, or write elsewhere")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: its folder cannot be made ({error.strerror}): choose another") from None


def _index(source: OnDisk, plan: Plan) -> dict[str, Any]:
    index = dict(source.shards.index or {})
    metadata = dict(index.get("metadata") or {})
    pieces = [piece for entries in plan.values() for piece in entries]
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(piece.numel for piece in pieces) - sum(t.numel for t in source.shards.tensors.values())
    metadata["total_size"] = sum(piece.size for piece in pieces)
    weight_map = {piece.name: file for file, entries in plan.items() for piece in entries}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def prove_bytes(plan: Plan, written: Path) -> None:
    """Raise ExpansionError unless every copied tensor has the bits of its source."""
    found = open_shards(written).tensors
    for pieces in plan.values():
        for piece in pieces:
            if piece.stored is not None and not same_bytes(piece.stored, found[piece.name]):
                raise ExpansionError(f"{piece.name} came out with other bits than {piece.stored.name} of {piece.stored.file}")
