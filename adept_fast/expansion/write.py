"""Expansion to a checkpoint that plain AutoModelForCausalLM loads, verified by a fresh load before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adept_fast import checkpoint
from adept_fast.data.items import Item
from adept_fast.errors import ExpansionError
from adept_fast.expansion.first_rates import FILE, as_tensors, first_importance
from adept_fast.expansion.insert import expand_model
from adept_fast.expansion.verify import verify_expansion
from adept_fast.families import layers_path
from adept_fast.record import AdeptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def expand_checkpoint(
    source: str | Path,
    target: str | Path,
    layers: Iterable[int],
    *,
    name: str | None = None,
    steering: Sequence[Item] = (),
    selection: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    quiet: bool | None = None,
    **loading: Any,
) -> AdeptConfig:
    """Write `source` (a folder or hub name) with silent copies of `layers` to the new folder `target`; returns its record.

    The whole model passes through memory once, in the checkpoint's dtype. name: what the record calls the source (default: `source`).
    steering: probe items for the first unit importances, which are stored beside the weights. The written model is compared with the
    source, loaded afresh and verified; on failure `target` does not appear.
    Raises InputError for bad input, ExpansionError when the logits differ.
    """
    folder = checkpoint.resolve(str(source))
    base = checkpoint.load_model(folder, **loading)
    expanded = expand_model(base, layers)
    expanded.adept_config = replace(
        expanded.adept_config,
        source={
            **expanded.adept_config.source,
            "name_or_path": name or str(source),
            "sha256": checkpoint.fingerprint(folder),
        },
        selection={"layers": [entry.copied_from for entry in expanded.adept_config.inserted], **(selection or {})},
        inputs=dict(inputs or {}),
    )
    extra = {FILE: as_tensors(first_importance(expanded, steering, quiet))} if steering else {}

    def prove(written: Path) -> None:
        touched = checkpoint.differing_tensors(folder, written, _renamed(expanded))
        if touched:
            raise ExpansionError(f"{len(touched)} tensors of {folder} came out changed, first {touched[0]}")
        verify_expansion(base, checkpoint.load_model(written, **loading))

    checkpoint.save(expanded, folder, Path(target), extra, prove)
    return expanded.adept_config


def _renamed(expanded: PreTrainedModel) -> Callable[[str], str]:
    """Names of the source's tensors -> their names in the expanded model."""
    prefix = layers_path(expanded) + "."
    copied = [entry.copied_from for entry in expanded.adept_config.inserted]

    def rename(name: str) -> str:
        if not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + sum(source < int(index) for source in copied)}.{rest}"

    return rename
