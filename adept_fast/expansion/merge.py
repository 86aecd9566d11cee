"""Two domains on one base: their copies averaged, as ADEPT's authors do (arXiv 2510.10071), or stacked, both sets in one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig, Inserted
from adept_fast.checkpoints.byte_copy import Piece
from adept_fast.checkpoints.digest import kind_of
from adept_fast.checkpoints.safetensors_index import FLOATS, Stored, same_bytes
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.edit_checkpoint import counterpart, open_expanded, source_config, write_remade
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor
from adept_fast.expansion.verify import observe, random_inputs

WAYS = ("average", "stack")


def merge_copies(
    a: str | Path,
    b: str | Path,
    target: str | Path,
    weights: Sequence[float] = (0.5, 0.5),
    how: str = "average",
    *,
    verify: bool = True,
    quiet: bool = False,
    **loading: Any,
) -> AdeptConfig:
    """Write one checkpoint with the copies of the tuned checkpoints `a` and `b`, made on the same base, to the folder `target`.

    how "average": copies of the same layers become weights[0] * a + weights[1] * b, rounded once from fp64. "stack": b's copies of a layer
    come after a's, unchanged. verify: prove that the base is in it bit for bit, load it, and refuse logits that are not finite.
    Raises InputError for other bases, other layers (average), weights that do not sum to 1, or an unknown `how`.
    """
    if how not in WAYS:
        raise InputError(f"how must be one of {', '.join(WAYS)}, found {how!r}")
    remote = bool(loading.get("trust_remote_code", False))
    (first, ours), (second, theirs) = open_expanded(a, remote, verify), open_expanded(b, remote, verify)
    digest = ours.source["tensors_digest"]
    known, kind = theirs.source["tensors_digest"], kind_of(digest)
    if digest != (known if kind_of(known) == kind else second.originals_digest(theirs, kind)):
        names = [record.source.get("name_or_path") for record in (ours, theirs)]
        raise InputError(f"{a} and {b}: made on different bases ({names[0]} and {names[1]}): only copies of one base can be merged")
    if how == "average":
        layers, inserted = _averaged(first, ours, second, theirs, weights), ours.inserted
    else:
        layers, inserted = _stacked(first, ours, second, theirs)
    merged = {"how": how, "of": [str(a), str(b)], "selections": [dict(ours.selection), dict(theirs.selection)]}
    if how == "average":
        merged["weights"] = [float(weight) for weight in weights]
    record = replace(ours, inserted=inserted, selection={"merged": merged}, inputs={"model": ours.inputs.get("model")})

    def prove(written: Path) -> None:
        model = checkpoint.load_model(written, **loading)
        if not all(bool(logits.isfinite().all()) for _, logits in observe(model, random_inputs(model))):
            raise ExpansionError(f"{target}: the merged model's logits are not finite")

    return write_remade(target, first, layers, source_config(first, record, inserted), record, ours.source, verify, quiet, prove)


def _averaged(first: OnDisk, ours: AdeptConfig, second: OnDisk, theirs: AdeptConfig, weights: Sequence[float]) -> list[Layer]:
    if len(weights) != 2 or not all(math.isfinite(weight) for weight in weights) or abs(sum(weights) - 1) > 1e-9:
        raise InputError(f"weights must be two numbers that sum to 1, found {list(weights)}")
    places = [[(entry.layer, entry.copied_from) for entry in record.inserted] for record in (ours, theirs)]
    if places[0] != places[1]:
        copied = [[source for _, source in each] for each in places]
        raise InputError(f"copies of layers {copied[0]} and {copied[1]} cannot be averaged: stack them (how=stack)")
    tensors = second.shards.tensors

    def average(stored: Stored, name: str) -> Piece:
        other = counterpart(tensors, second.folder, stored, stored.name)
        if same_bytes(stored, other):
            return Piece(name, stored.dtype, stored.shape, stored)
        if stored.dtype not in FLOATS:
            raise InputError(f"{stored.name}: {stored.dtype} values that differ cannot be averaged: stack the copies (how=stack)")

        def made() -> bytes:
            one, two = as_tensor(stored), as_tensor(other)
            return as_bytes((weights[0] * one.double() + weights[1] * two.double()).to(one.dtype))

        return Piece(name, stored.dtype, stored.shape, made=made)

    return [Layer(index, average if index in ours.copies else None) for index in range(first.count)]


def _stacked(first: OnDisk, ours: AdeptConfig, second: OnDisk, theirs: AdeptConfig) -> tuple[list[Layer], tuple[Inserted, ...]]:
    layers: list[Layer] = []
    inserted: list[Inserted] = []
    copies = [{index: [e for e in record.inserted if e.copied_from == index] for index in range(first.count)} for record in (ours, theirs)]
    tensors = second.shards.tensors

    def from_second(layer: int, stored: Stored, name: str) -> Piece:
        other = counterpart(tensors, second.folder, stored, first.naming.moved(stored.name, layer))
        return Piece(name, other.dtype, other.shape, other)

    for index in range(first.count - len(ours.copies)):
        original = ours.original(index)
        layers.append(Layer(original))
        for entry in copies[0][index]:
            inserted.append(replace(entry, layer=len(layers)))
            layers.append(Layer(entry.layer))
        for entry in copies[1][index]:
            inserted.append(replace(entry, layer=len(layers)))
            layers.append(Layer(original, partial(from_second, entry.layer)))
    return layers, tuple(inserted)
