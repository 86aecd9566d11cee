"""Extract the copies of a model as a small checkpoint (a delta), and apply them to the base that they were made on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.byte_copy import Piece, write_shards
from adept_fast.checkpoints.digest import identity, tensors_digest
from adept_fast.checkpoints.finite_bytes import require_finite
from adept_fast.checkpoints.safetensors_index import Stored, read_header
from adept_fast.errors import InputError
from adept_fast.expansion.config_file import config_file
from adept_fast.expansion.edit_checkpoint import matching_tensor, open_expanded, write_edited
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, require_space
from adept_fast.runtime.atomic_files import staged_folder
from adept_fast.settings.validation import require_path

FILE = "adept_copies.safetensors"


def extract_copies(source: str | Path, target: str | Path, *, trust_remote_code: bool = False) -> AdeptConfig:
    """Write only the copies of an expanded or tuned checkpoint, and its record, to a new folder. Tensors keep their names and bits.

    Args:
        source: the checkpoint, a folder or hub name.
        target: the folder to write; it must not exist.
        trust_remote_code: as in transformers.

    Returns:
        The record. `source["tensors_digest"]` identifies the base, `proof["copies_digest"]` the copies.

    Raises:
        InputError: `source` has no record, or does not agree with it.
        ExpansionError: the original layers were trained too, which a delta cannot hold.

    >>> record = expand_checkpoint("base", "expanded", [1])
    >>> extract_copies("expanded", "delta").copies
    (2,)
    """
    on_disk, record = open_expanded(source, trust_remote_code)
    copies = set(record.copies)
    tensors = [stored for stored in on_disk.shards.tensors.values() if on_disk.naming.layer(stored.name) in copies]
    pieces = [Piece(stored.name, stored.dtype, stored.shape, stored) for stored in tensors]
    target = require_path("target", target)
    require_space(target, sum(piece.size for piece in pieces))
    with staged_folder(target) as staging:
        write_shards(staging, {FILE: pieces}, {FILE: {"format": "pt"}}, lambda _: None)
        record = replace(record, proof={"copies_digest": tensors_digest({stored.name: stored for stored in tensors})})
        record.save(staging)
    return record


def apply_copies(
    base: str | Path,
    delta: str | Path,
    target: str | Path,
    *,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write a base checkpoint with extracted copies to a new folder.

    Args:
        base: the checkpoint that the copies were made on, a folder or hub name.
        delta: a folder written by `extract_copies`, which has an example.
        target: the folder to write; it must not exist.
        verify: compare every written tensor and the digest of the base; False leaves a note in the record.
        trust_remote_code: as in transformers.

    Returns:
        The record of the new checkpoint.

    Raises:
        InputError: the tensors of `base` are not those that the copies were made on, or the delta is incomplete or corrupt.

    >>> records = expand_checkpoint("base", "expanded", [1]), extract_copies("expanded", "delta")
    >>> apply_copies("base", "delta", "applied").copies
    (2,)
    """
    delta = require_path("delta", delta)
    if not (delta / FILE).is_file():
        raise InputError(f"{delta}: no {FILE}: not what extract_copies writes")
    folder, record = checkpoint.resolve(base, name="base"), AdeptConfig.load(delta)
    on_disk = OnDisk.open(folder, trust_remote_code)
    expected = str(record.source.get("tensors_digest"))
    found = tensors_digest(on_disk.shards.tensors)
    if found != expected:
        raise InputError(
            f"{base}: not the base of {delta}, which was made on {record.source.get('name_or_path')}: tensors {found}, expected {expected}"
        )
    tensors = {stored.name: stored for stored in read_header(delta / FILE)[0]}
    written = record.proof.get("copies_digest")
    if written is not None and tensors_digest(tensors) != written:
        raise InputError(f"{delta / FILE}: corrupt: not the bytes that were extracted: extract the copies again")
    require_finite(tensors.values(), "its training went wrong: extract the copies of a checkpoint before that")
    copies = {entry.layer: entry for entry in record.inserted}

    def from_delta(template: Stored, name: str) -> Piece:
        stored = matching_tensor(tensors, delta / FILE, template, name)
        return Piece(name, stored.dtype, stored.shape, stored)

    layers, originals = [], iter(range(on_disk.count))
    for index in range(on_disk.count + len(copies)):
        layers.append(Layer(copies[index].copied_from, from_delta) if index in copies else Layer(next(originals)))
    base_config = folder.config
    config = config_file(base_config, on_disk.skeleton.config, [entry.copied_from for entry in record.inserted])
    source = {**record.source, "name_or_path": str(base), "identity": identity(folder.path, found), "config": base_config}
    return write_edited(target, on_disk, layers, config, replace(record, source=source), source, verify)
