"""Expansion to a checkpoint that plain AutoModelForCausalLM loads, verified by a fresh load before it gets its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adept_fast import checkpoint
from adept_fast.data.items import Item
from adept_fast.expansion.first_rates import FILE, as_tensors, first_importance
from adept_fast.expansion.insert import expand_model
from adept_fast.expansion.verify import verify_expansion
from adept_fast.record import AdeptConfig


def expand_checkpoint(
    source: str | Path,
    target: str | Path,
    layers: Iterable[int],
    *,
    steering: Sequence[Item] = (),
    selection: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    quiet: bool | None = None,
    **loading: Any,
) -> AdeptConfig:
    """Write `source` (a folder or hub name) with silent copies of `layers` to the new folder `target`; returns its record.

    The whole model passes through memory once, in the checkpoint's dtype. steering: probe items for the first unit importances,
    which are stored beside the weights. The written model is loaded afresh and verified; on failure `target` does not appear.
    Raises InputError for bad input, ExpansionError when the logits differ.
    """
    folder = checkpoint.resolve(str(source))
    base = checkpoint.load_model(folder, **loading)
    expanded = expand_model(base, layers)
    expanded.adept_config = replace(
        expanded.adept_config,
        source={
            **expanded.adept_config.source,
            "name_or_path": str(source),
            "sha256": checkpoint.fingerprint(folder),
        },
        selection={"layers": [entry.copied_from for entry in expanded.adept_config.inserted], **(selection or {})},
        inputs=dict(inputs or {}),
    )
    extra = {FILE: as_tensors(first_importance(expanded, steering, quiet))} if steering else {}

    def prove(written: Path) -> None:
        verify_expansion(base, checkpoint.load_model(written, **loading))

    checkpoint.save(expanded, folder, Path(target), extra, prove)
    return expanded.adept_config
