"""Merge the copies of two domains on one base: average them, as ADEPT's authors do (arXiv 2510.10071), or stack both sets in one model."""

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
from adept_fast.checkpoints.safetensors_index import FLOATS, Stored, same_bytes
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.edit_checkpoint import matching_tensor, open_expanded, source_config, write_edited
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, as_bytes, as_tensor
from adept_fast.expansion.settings import MERGES
from adept_fast.expansion.verify import compute_logits, random_inputs
from adept_fast.settings.validation import require, shown


def merge_copies(
    a: str | Path,
    b: str | Path,
    target: str | Path,
    weights: Sequence[float] = (0.5, 0.5),
    how: str = "average",
    *,
    verify: bool = True,
    **loading: Any,
) -> AdeptConfig:
    """Write one checkpoint with the copies of two tuned checkpoints of the same base to a new folder.

    Args:
        a, b: the tuned checkpoints, folders or hub names.
        target: the folder to write; it must not exist.
        weights: two numbers that sum to 1, for how="average".
        how: "average" gives weights[0] * a + weights[1] * b, rounded once from fp64, for copies of the same layers; "stack" puts b's copies
            of a layer after a's, unchanged.
        verify: compare the base in the result bit for bit, load it, and require finite logits.
        loading: keyword arguments of `from_pretrained`.

    Returns:
        The record. `selection["merged"]` names both checkpoints, how and with which weights they were merged.

    Raises:
        InputError: different bases, different layers (average), wrong weights, or an unknown `how`.
        ExpansionError: the result does not hold the base, or its logits are not finite.

    Source: ADEPT (arXiv 2510.10071).

    >>> records = expand_checkpoint("base", "law", [1]), expand_checkpoint("base", "medicine", [1])
    >>> merge_copies("law", "medicine", "both", how="stack").copies
    (2, 3)
    """
    if how not in MERGES:
        raise InputError(f"how must be one of {', '.join(MERGES)}, found {shown(how)}")
    remote = bool(loading.get("trust_remote_code", False))
    (first, ours), (second, theirs) = open_expanded(a, remote, verify, "a"), open_expanded(b, remote, verify, "b")
    if ours.source["tensors_digest"] != theirs.source["tensors_digest"]:
        names = [record.source.get("name_or_path") for record in (ours, theirs)]
        raise InputError(f"{a} and {b}: made on different bases ({names[0]} and {names[1]}): only copies of one base can be merged")
    if how == "average":
        layers, inserted = _averaged(first, ours, second, theirs, weights), ours.inserted
    else:
        layers, inserted = _stacked(first, ours, second, theirs)
    merged: dict[str, Any] = {"how": how, "of": [str(a), str(b)], "selections": [dict(ours.selection), dict(theirs.selection)]}
    if how == "average":
        merged["weights"] = [float(weight) for weight in weights]
    record = replace(ours, inserted=inserted, selection={"merged": merged}, inputs={"model": ours.inputs.get("model")})

    def prove(written: Path) -> None:
        model = checkpoint.load_model(written, **loading)
        if not all(bool(logits.isfinite().all()) for _, logits in compute_logits(model, random_inputs(model))):
            raise ExpansionError(f"{target}: the merged model's logits are not finite")

    return write_edited(target, first, layers, source_config(first, record, inserted), record, ours.source, verify, prove)


def _averaged(first: OnDisk, ours: AdeptConfig, second: OnDisk, theirs: AdeptConfig, weights: Sequence[float]) -> list[Layer]:
    require("weights", weights, tuple[float, ...])
    if len(weights) != 2 or not all(math.isfinite(weight) for weight in weights) or abs(sum(weights) - 1) > 1e-9:
        raise InputError(f"weights must be two numbers that sum to 1, found {list(weights)}")
    if [(entry.layer, entry.copied_from) for entry in ours.inserted] != [(entry.layer, entry.copied_from) for entry in theirs.inserted]:
        copied = [[entry.copied_from for entry in record.inserted] for record in (ours, theirs)]
        raise InputError(f"copies of layers {copied[0]} and {copied[1]} cannot be averaged: stack them (how=stack)")

    def average(stored: Stored, name: str) -> Piece:
        other = matching_tensor(second.shards.tensors, second.folder, stored, stored.name)
        if same_bytes(stored, other):
            return Piece(name, stored.dtype, stored.shape, stored)
        if stored.dtype not in FLOATS:
            raise InputError(f"{stored.name}: {stored.dtype} values that differ cannot be averaged: stack the copies (how=stack)")

        def mean() -> bytes:
            one, two = as_tensor(stored), as_tensor(other)
            return as_bytes((weights[0] * one.double() + weights[1] * two.double()).to(one.dtype))

        return Piece(name, stored.dtype, stored.shape, made=mean)

    return [Layer(index, average if index in ours.copies else None) for index in range(first.count)]


def _stacked(first: OnDisk, ours: AdeptConfig, second: OnDisk, theirs: AdeptConfig) -> tuple[list[Layer], tuple[Inserted, ...]]:
    layers: list[Layer] = []
    inserted: list[Inserted] = []

    def from_second(layer: int, stored: Stored, name: str) -> Piece:
        other = matching_tensor(second.shards.tensors, second.folder, stored, first.naming.moved(stored.name, layer))
        return Piece(name, other.dtype, other.shape, other)

    for index in range(first.count - len(ours.copies)):
        original = ours.original(index)
        layers.append(Layer(original))
        for record in (ours, theirs):
            for entry in (entry for entry in record.inserted if entry.copied_from == index):
                inserted.append(replace(entry, layer=len(layers)))
                layers.append(Layer(entry.layer) if record is ours else Layer(original, partial(from_second, entry.layer)))
    return layers, tuple(inserted)
