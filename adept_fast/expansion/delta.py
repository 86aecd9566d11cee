"""The copies alone, as a small checkpoint, and their application to the base they belong to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.byte_copy import Piece, write_shards
from adept_fast.checkpoints.digest import identity, kind_of, tensors_digest
from adept_fast.checkpoints.finite_bytes import require_finite
from adept_fast.checkpoints.safetensors_index import read_header
from adept_fast.errors import InputError
from adept_fast.expansion.config_file import config_file
from adept_fast.expansion.edit_checkpoint import open_expanded, taken, write_remade
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, make_room
from adept_fast.runtime.atomic_files import staged_folder
from adept_fast.runtime.input_files import read_json

FILE = "adept_copies.safetensors"


def extract_copies(source: str | Path, target: str | Path, *, quiet: bool = False, trust_remote_code: bool = False) -> AdeptConfig:
    """Write the copies of the expanded or tuned checkpoint `source` and its record, and nothing else, to the folder `target`.

    The tensors keep their names and bits. Returns the record, whose source.tensors_digest says what base they belong to, and its
    proof.copies_digest what they are. Raises ExpansionError where the originals were trained too, which a delta does not carry.
    """
    on_disk, record = open_expanded(source, trust_remote_code)
    copies = set(record.copies)
    tensors = [stored for stored in on_disk.shards.tensors.values() if on_disk.naming.layer(stored.name) in copies]
    pieces = [Piece(stored.name, stored.dtype, stored.shape, stored) for stored in tensors]
    target = Path(target).expanduser()
    make_room(target, sum(piece.size for piece in pieces))
    with staged_folder(target) as staging:
        write_shards(staging, {FILE: pieces}, {FILE: {"format": "pt"}}, lambda _: None)
        proof = {"copies_digest": tensors_digest({stored.name: stored for stored in tensors})}
        record = replace(record, proof=proof)
        record.save(staging)
    return record


def apply_copies(
    base: str | Path,
    delta: str | Path,
    target: str | Path,
    *,
    verify: bool = True,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> AdeptConfig:
    """Write `base` with the copies of `delta` (a folder that extract_copies wrote) to the folder `target`.

    Raises InputError where the base's tensors are not those that the copies were made on, or the delta is not whole.
    """
    delta = Path(delta).expanduser()
    if not (delta / FILE).is_file():
        raise InputError(f"{delta}: no {FILE}: not what extract_copies writes")
    folder, record = checkpoint.resolve(str(base)), AdeptConfig.load(delta)
    on_disk = OnDisk.open(folder, trust_remote_code)
    expected = str(record.source.get("tensors_digest"))
    found = tensors_digest(on_disk.shards.tensors, kind_of(expected))
    if found != expected:
        raise InputError(
            f"{base}: not the base of {delta}, which was made on {record.source.get('name_or_path')}: tensors {found}, expected {expected}"
        )
    tensors = {stored.name: stored for stored in read_header(delta / FILE)[0]}
    written = record.proof.get("copies_digest")
    if written is not None and tensors_digest(tensors, kind_of(written)) != written:
        raise InputError(f"{delta / FILE}: corrupt: not the bytes that were extracted: extract the copies again")
    require_finite(tensors.values(), "its training went wrong: extract the copies of a checkpoint before that")
    places = {entry.layer: entry for entry in record.inserted}
    layers, originals = [], iter(range(on_disk.count))
    for index in range(on_disk.count + len(places)):
        entry = places.get(index)
        layers.append(Layer(next(originals)) if entry is None else Layer(entry.copied_from, partial(taken, tensors, delta / FILE)))
    held = read_json(folder / "config.json")
    config = config_file(held, on_disk.skeleton.config, [entry.copied_from for entry in record.inserted])
    source = {**record.source, "name_or_path": str(base), "identity": identity(folder, found), "config": held}
    return write_remade(target, on_disk, layers, config, replace(record, source=source), source, verify, quiet)
