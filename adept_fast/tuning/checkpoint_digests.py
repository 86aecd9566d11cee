"""Write and verify digests.json of each training checkpoint: the xxh3 of all its other files.

Optimizer moments and random states have no checksums: without a digest a flipped bit would be read as another number.
"""

from __future__ import annotations

from pathlib import Path

import xxhash
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_json
from adept_fast.runtime.input_files import read_json

FILE = "digests.json"
KIND = "xxh3_128"
CHUNK = 1 << 20  # bytes


def write(folder: Path) -> None:
    """Write the digests of all files of a checkpoint, before it gets its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / FILE, {"schema": 1, "files": {path.relative_to(folder).as_posix(): _digest(path) for path in files}})


def verify(folder: Path) -> None:
    """Require that the files of a checkpoint, digests.json among them, are there as they were written.

    Raises InputError, which names the file and the way out. Files that were added later are ignored.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path}: missing, so nothing says that {folder.name} is as it was written: {_way_out(folder)}")
    listed = read_json(path).get("files")
    if not isinstance(listed, dict) or not listed or not all(isinstance(value, str) for value in listed.values()):
        raise InputError(f"{path}: not the digests of a checkpoint: {_way_out(folder)}")
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing: {_way_out(folder)}")
        if _digest(folder / name) != expected:
            raise InputError(f"{folder / name}: corrupt: not the bytes that were written ({FILE}): {_way_out(folder)}")


def _way_out(folder: Path) -> str:
    steps = [int(step) for other in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := other.name.rpartition("-")[2]).isdecimal()]
    earlier = [step for step in steps if f"{PREFIX_CHECKPOINT_DIR}-{step}" != folder.name]
    if earlier:
        return f"delete {folder.name}, and training goes on from {PREFIX_CHECKPOINT_DIR}-{max(earlier)}"
    return f"delete {folder.name}, and training starts again (save_total_limit=2 keeps one more)"


def _digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(CHUNK):
            found.update(block)
    return f"{KIND}:{found.hexdigest()}"
