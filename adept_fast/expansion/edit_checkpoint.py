"""Open an expanded checkpoint, write an edited one, and prove that the result still holds the source, bit for bit.

Removing, applying, merging, dialling and exporting copies share this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import FILE, AdeptConfig, Inserted, versions
from adept_fast.checkpoints.finite_bytes import require_finite
from adept_fast.checkpoints.safetensors_index import Stored
from adept_fast.errors import ExpansionError, ForeignOriginalsError, InputError
from adept_fast.expansion.config_file import config_file
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, Record, plan_shards, prove_bytes, write_checkpoint
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.runtime.input_files import as_input_error
from adept_fast.settings.validation import require_path

INTACT = {"carried_tensors": "bit-equal", "source_tensors": "bit-equal to tensors_digest"}


def open_expanded(
    folder: str | Path, trust_remote_code: bool = False, prove: bool = True, name: str = "source"
) -> tuple[OnDisk, AdeptConfig]:
    """Open a checkpoint with copies and read its record. name: of the argument `folder`, for messages.

    prove: require that the copies are finite and that the original layers have the digest in the record. Otherwise the whole model was
    trained, and its copies do not hold all that it learnt. Raises InputError for a missing or contradictory record and for copies that are
    not finite, ExpansionError for other originals.
    """
    found = checkpoint.resolve(folder, name=name)
    path = found.path
    record, on_disk = AdeptConfig.load(path, found.config), OnDisk.open(found, trust_remote_code)
    record.require_layers(on_disk.count, path)
    if not record.source.get("tensors_digest") or not record.source.get("num_hidden_layers"):
        raise _not_described(path)
    if prove:
        require_finite(on_disk.parameters(record.copies), "its training went wrong: go back to a checkpoint before that")
        if on_disk.originals_digest(record) != record.source["tensors_digest"]:
            raise ForeignOriginalsError(
                f"{path}: its originals are not those of {record.source.get('name_or_path')}, bit for bit: they were trained, or saved in "
                "another dtype; the copies do not hold what they learnt"
            )
    return on_disk, record


def _not_described(folder: Path) -> InputError:
    return InputError(f"{folder}: its record does not say what the source was: expand on disk (expand_checkpoint, adept-fast expand)")


def source_config(on_disk: OnDisk, record: AdeptConfig, inserted: Sequence[Inserted] = ()) -> dict[str, Any]:
    """Return the content of the source's config.json with the copies `inserted`."""
    content = record.source.get("config")
    if not isinstance(content, Mapping):
        raise _not_described(on_disk.folder)
    with as_input_error(on_disk.folder / FILE, "restore the record, or expand again"):
        config = type(on_disk.skeleton.config).from_dict(dict(content))
    return config_file(content, config, [entry.copied_from for entry in inserted])


def write_edited(
    target: str | Path,
    on_disk: OnDisk,
    layers: Sequence[Layer],
    config: Mapping[str, Any],
    record: Record,
    source: Mapping[str, Any],
    verify: bool,
    prove: Callable[[Path], None] | None = None,
) -> Record:
    """Write a checkpoint of `layers`, and prove before it gets its name that the source's tensors in it have the recorded digest.

    record: of the result; None where no copy is left. source: the record's description of the source. verify: False skips the proof and
    leaves a note in the record. prove: a further check of the written folder.
    """
    plan = plan_shards(on_disk, layers)
    if record is not None:
        proof = dict(INTACT) if verify else {"note": "not compared (verify=False)"}
        record = replace(record, proof=proof, versions=versions(), parameters=_parameters(on_disk, record, layers))

    def check(written: Path) -> None:
        prove_bytes(plan, written)
        result = _reopen(written, on_disk)
        if result.originals_digest(record) != source["tensors_digest"]:
            raise ExpansionError(f"{target}: its source's tensors would not be those of {source.get('name_or_path')}, bit for bit")
        if prove:
            prove(written)

    base = str(source.get("name_or_path"))
    return write_checkpoint(require_path("target", target), on_disk, plan, config, lambda: record, base, check if verify else None)


def _reopen(written: Path, on_disk: OnDisk) -> OnDisk:
    """Open what was written. Its bytes are proven and its config comes from the record, so a contradiction is the record's fault, and the
    message names the record, not the staging folder."""
    try:
        return OnDisk.open(written)
    except InputError as error:
        record = on_disk.folder / FILE
        where = f"{record}: its source.config" if record.is_file() else f"{on_disk.folder}: its config"
        reason = str(error).replace(str(written), "what it gives")
        raise InputError(f"{where} does not fit the tensors ({reason}): restore it") from error


def _parameters(on_disk: OnDisk, record: AdeptConfig, layers: Sequence[Layer]) -> dict[str, int]:
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(on_disk.skeleton)]
    total = sum(parameter.numel() for parameter in on_disk.skeleton.parameters())
    edited = [sizes[layer.template] for layer in layers]
    return {"total": total - sum(sizes) + sum(edited), "trainable": sum(edited[layer] for layer in record.trained)}


def matching_tensor(tensors: Mapping[str, Stored], where: Path, template: Stored, name: str) -> Stored:
    """Return the tensor `name` of the checkpoint `where`. Raises InputError unless it has the template's dtype and shape."""
    stored = tensors.get(name)
    if stored is None or (stored.dtype, stored.shape) != (template.dtype, template.shape):
        found = f"is {stored.dtype} {list(stored.shape)}" if stored else "is missing"
        raise InputError(f"{where}: {ascii(name)} {found}, expected {template.dtype} {list(template.shape)}: not of this base")
    return stored


