"""Copies taken out again: all of them give back the source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import InputError
from adept_fast.expansion.edit_checkpoint import open_expanded, source_config, write_remade
from adept_fast.expansion.rewrite_checkpoint import Layer


def remove_copies(
    source: str | Path,
    target: str | Path,
    copies: Iterable[int] | None = None,
    *,
    verify: bool = True,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> AdeptConfig | None:
    """Write the expanded or tuned checkpoint `source` without `copies` (their layer indices in it; None: all) to the folder `target`.

    Without copies it is the original again: its tensors bit for bit, proven by their digest, its config, and no record (None is returned).
    Raises InputError for layers that are no copies, ExpansionError where the original's tensors are not all there.
    """
    on_disk, record = open_expanded(source, trust_remote_code, verify)
    out = set(record.copies if copies is None else copies)
    if not out or not out <= set(record.copies):
        raise InputError(f"copies must be among the layers {list(record.copies)}, which are copies, found {sorted(out, key=str)}")
    left = [index for index in range(on_disk.count) if index not in out]
    inserted = tuple(replace(entry, layer=left.index(entry.layer)) for entry in record.inserted if entry.layer not in out)
    remaining = replace(record, inserted=inserted) if inserted else None
    config = source_config(on_disk, record, inserted)
    return write_remade(target, on_disk, [Layer(index) for index in left], config, remaining, record.source, verify, quiet)
