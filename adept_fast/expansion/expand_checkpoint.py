"""Write an expanded checkpoint that AutoModelForCausalLM loads, verified by a fresh load before it gets its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import KEY, AdeptConfig, record_of
from adept_fast.checkpoints.digest import identity
from adept_fast.checkpoints.finite_bytes import require_finite
from adept_fast.checkpoints.one_model import OneModel
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.data.items import Item
from adept_fast.expansion.config_file import config_file
from adept_fast.expansion.expand_model import expand_model, place_copies
from adept_fast.expansion.first_importance import FILE, as_tensors, first_importance
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, naming_folder, plan_shards, prove_bytes, write_checkpoint
from adept_fast.expansion.verify import TOKENS, compute_logits, random_inputs, require_equal_logits
from adept_fast.models.layer_config import broken_periods, expanded_config
from adept_fast.settings.validation import require, require_made, require_path, require_table

logger = logging.getLogger(__name__)


def expand_checkpoint(
    source: str | os.PathLike[str],
    target: str | Path,
    layers: Iterable[int],
    *,
    name: str | None = None,
    steering: Sequence[Item] = (),
    selection: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    initialisation: str = "zero_output",
    verify: bool = True,
    models: OneModel | None = None,
    **loading: Any,
) -> AdeptConfig:
    """Write a checkpoint with silent copies of some layers to a new folder. Tensors are copied from shard to shard as bytes.

    Args:
        source: the checkpoint to expand, a folder or hub name.
        target: the folder to write; it must not exist, and does not appear on failure.
        layers: the layer indices to copy; each copy comes right after its layer.
        name: the source's name in the record; default `source`.
        steering: probe items for the first unit importances, which are stored beside the weights. They need the model in memory.
        selection: how the layers were chosen, for the record.
        inputs: what the result was made from, for the record.
        initialisation: as in `expand_model`.
        verify: compare every carried tensor, then load source and result in turn and compare their logits (where the initialisation
            is silent). False, for a model that memory cannot hold, leaves a note in the record.
        models: loads and caches the last model, in place of `loading`; afterwards it holds the result, if that was loaded.
        loading: keyword arguments of `from_pretrained`: dtype, trust_remote_code, attn_implementation.

    Returns:
        The record. `selection["notes"]` warns of inference engines that would build another model from config.json.

    Raises:
        InputError: bad arguments, a malformed checkpoint, or a full disk.
        ExpansionError: a carried tensor or a logit differs.
        UnsupportedFamilyError: copies of these layers cannot be made silent.

    >>> expand_checkpoint("base", "expanded", [0, 2]).copies
    (1, 4)
    """
    require_table("selection", selection)
    require_table("inputs", inputs)
    require_made("steering", steering, Sequence, "load_items(probe, tokenizer)")
    for item in steering:
        require_made("an item of steering", item, Item, "load_items(probe, tokenizer) makes them of texts and records")
    models = OneModel(**loading) if models is None else models
    require_made("models", models, OneModel, "leave it out")
    model_folder, target = checkpoint.resolve(source, name="source"), require_path("target", target)
    if name is not None:
        require("name", name, str)
    folder, source_config = model_folder.path, model_folder.config
    on_disk = OnDisk.open(model_folder, models.trust_remote_code)
    earlier = model_folder.record
    setattr(on_disk.skeleton, KEY, earlier)
    layout = place_copies(layers, on_disk.count, earlier)
    chosen = [layout.sources[index] for index in layout.new]
    with naming_folder(folder):
        expanded = record_of(expand_model(on_disk.skeleton, chosen, initialisation))
        warnings = broken_periods(on_disk.skeleton.config, expanded_config(on_disk.skeleton.config, chosen))
    for line in warnings:
        logger.warning(line)
    config = config_file(source_config, on_disk.skeleton.config, chosen)
    make = partial(on_disk.copied, how=initialisation)
    plan = plan_shards(on_disk, [Layer(index, make if at in layout.new else None) for at, index in enumerate(layout.sources)])
    extra, expected = {}, None
    if earlier:  # the digest below covers the originals only
        require_finite(on_disk.parameters(earlier.copies), "train the copies again, or take them out (copies remove)")
    if steering or (verify and PRESERVING[initialisation]):
        base = models.load(model_folder)
        if verify and PRESERVING[initialisation]:
            expected = compute_logits(base, random_inputs(base))
        if steering:
            extra = {FILE: as_tensors(first_importance(expand_model(base, chosen), steering))}
        del base
    with ThreadPoolExecutor(1) as beside:  # hashing is bound by the CPU, copying by the disk
        known = earlier.source.get("tensors_digest") if earlier else None
        finite = {stored.name for stored in on_disk.parameters()}
        digest = beside.submit(on_disk.originals_digest, earlier, threads=1, finite=finite)

        def record() -> AdeptConfig:
            tensors = digest.result()
            if earlier is None:
                named = {"name_or_path": name or str(source), "identity": identity(folder, tensors)}
                described = {**expanded.source, **named, "config": source_config}
            else:
                described = {**earlier.source, **({"saved_again": True} if known != tensors else {})}
            return replace(
                expanded,
                source={**described, "tensors_digest": tensors},
                selection={"layers": chosen, **(selection or {}), "notes": [*(selection or {}).get("notes", ()), *warnings]},
                inputs=dict(inputs or {}),
                proof=_proof(initialisation, models.dtype) if verify else {"note": "not loaded and not compared (verify=False)"},
            )

        def prove(written: Path) -> None:
            prove_bytes(plan, written)
            if expected is not None:
                model = models.load(written)
                require_equal_logits(expected, compute_logits(model, random_inputs(model)))
                models.renamed(written, target)

        named = str(earlier.source.get("name_or_path")) if earlier else name or str(source)
        return write_checkpoint(target, on_disk, plan, config, record, named, prove if verify else None, extra)


def _proof(initialisation: str, dtype: str | None) -> dict[str, Any]:
    if not PRESERVING[initialisation]:
        return {"carried_tensors": "bit-equal", "note": f"{initialisation} changes what the model computes"}
    equal = dict.fromkeys(("carried_tensors", "logits", "decoding"), "bit-equal")
    return {**equal, "tokens": list(TOKENS), "dtype": dtype or "its own"}
