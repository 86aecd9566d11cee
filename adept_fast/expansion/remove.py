"""Remove copies from a checkpoint; without any it is the source again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import InputError
from adept_fast.expansion.edit_checkpoint import open_expanded, source_config, write_edited
from adept_fast.expansion.rewrite_checkpoint import Layer
from adept_fast.settings.validation import require_made


def remove_copies(
    source: str | Path,
    target: str | Path,
    copies: Iterable[int] | None = None,
    *,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> AdeptConfig | None:
    """Write an expanded or tuned checkpoint without some of its copies to a new folder.

    Args:
        source: the checkpoint, a folder or hub name.
        target: the folder to write; it must not exist.
        copies: the layer indices in `source` of the copies to remove; None removes all.
        verify: compare every written tensor and the digest of the base; False leaves a note in the record.
        trust_remote_code: as in transformers.

    Returns:
        The record; None where no copy is left. The result is then the original checkpoint: its config, and its tensors bit for bit.

    Raises:
        InputError: an index is not a copy's, or `source` has no record.
        ExpansionError: the original layers of `source` are not those of its base.

    >>> record = expand_checkpoint("base", "expanded", [0, 2])
    >>> remove_copies("expanded", "one", [4]).copies
    (1,)
    """
    on_disk, record = open_expanded(source, trust_remote_code, verify)
    if copies is not None:
        require_made("copies", copies, Iterable, "give layer indices of copies, or leave it out to remove all")
    out = set(record.copies if copies is None else copies)
    if not out or not out <= set(record.copies):
        raise InputError(f"copies must be among the layers {list(record.copies)}, which are copies, found {sorted(out, key=str)}")
    left = [index for index in range(on_disk.count) if index not in out]
    inserted = tuple(replace(entry, layer=left.index(entry.layer)) for entry in record.inserted if entry.layer not in out)
    remaining = replace(record, inserted=inserted) if inserted else None
    config = source_config(on_disk, record, inserted)
    return write_edited(target, on_disk, [Layer(index) for index in left], config, remaining, record.source, verify)
