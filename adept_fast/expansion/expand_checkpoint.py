"""Expansion to a checkpoint that plain AutoModelForCausalLM loads, verified by a fresh load before it gets its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.digest import identity, kind_of
from adept_fast.checkpoints.finite_bytes import require_finite
from adept_fast.data.items import Item
from adept_fast.expansion.config_file import config_file
from adept_fast.expansion.expand_model import arrange_copies, expand_model
from adept_fast.expansion.first_importance import FILE, as_tensors, first_importance
from adept_fast.expansion.initialise import PRESERVING
from adept_fast.expansion.rewrite_checkpoint import Layer, OnDisk, arrange, prove_bytes, refusals_naming, write_checkpoint
from adept_fast.expansion.verify import TOKENS, compare, observe, random_inputs
from adept_fast.models import broken_periods, expanded_config
from adept_fast.runtime.input_files import read_json


def expand_checkpoint(
    source: str | Path,
    target: str | Path,
    layers: Iterable[int],
    *,
    name: str | None = None,
    steering: Sequence[Item] = (),
    selection: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    initialisation: str = "zero_output",
    verify: bool = True,
    quiet: bool = False,
    **loading: Any,
) -> AdeptConfig:
    """Write `source` (a folder or hub name) with copies of `layers` to the new folder `target`; returns its record.

    The tensors go from shards to shards as bytes, in their own dtypes, without passing through memory. name: what the record calls the
    source (default: `source`). steering: probe items for the first unit importances, which are stored beside the weights; they need the
    model in memory. verify: compare every carried tensor, then load source and result one after the other and compare their logits, in
    `loading`'s dtype; False, for a model that memory does not hold, leaves a note in the record. On failure `target` does not appear.
    The record's selection.notes warn of engines that would read another model from it.
    initialisation: see expand_model; logits are compared only where it leaves them as they are.
    Raises InputError for bad input, ExpansionError when bits differ.
    """
    folder, target = checkpoint.resolve(str(source)), Path(target).expanduser()
    on_disk = OnDisk.open(folder, loading.get("trust_remote_code", False))
    earlier = on_disk.skeleton.adept_config = AdeptConfig.find(folder)
    made = arrange_copies(layers, on_disk.count, earlier)
    chosen = [made.sources[index] for index in made.new]
    with refusals_naming(folder):
        expanded = expand_model(on_disk.skeleton, chosen, initialisation).adept_config
        warned = broken_periods(on_disk.skeleton.config, expanded_config(on_disk.skeleton.config, chosen))
    held = read_json(folder / "config.json")
    config = config_file(held, on_disk.skeleton.config, chosen)
    make = partial(on_disk.copied, how=initialisation)
    silenced = [Layer(source, make if index in made.new else None) for index, source in enumerate(made.sources)]
    plan = arrange(on_disk, silenced)
    extra, seen = {}, None
    if earlier:  # the digest below is of the originals
        require_finite(on_disk.parameters(earlier.copies), "train the copies again, or take them out (copies remove)")
    if steering or (verify and PRESERVING[initialisation]):
        base = checkpoint.load_model(folder, **loading)
        if verify and PRESERVING[initialisation]:
            seen = observe(base, random_inputs(base))
        if steering:
            extra = {FILE: as_tensors(first_importance(expand_model(base, chosen), steering, quiet))}
        del base
    with ThreadPoolExecutor(1) as beside:  # hashing and copying both wait for other things than each other
        known = earlier.source.get("tensors_digest") if earlier else None
        kind, finite = kind_of(known) if known else "xxh3_128", {stored.name for stored in on_disk.parameters()}
        digest = beside.submit(on_disk.originals_digest, earlier, kind, threads=1, finite=finite)

        def record() -> AdeptConfig:
            tensors = digest.result()
            if earlier is None:
                described = {**expanded.source, "name_or_path": name or str(source), "identity": identity(folder, tensors), "config": held}
            else:
                described = {**earlier.source, **({"saved_again": True} if known != tensors else {})}
            return replace(
                expanded,
                source={**described, "tensors_digest": tensors},
                selection={"layers": chosen, **(selection or {}), "notes": [*(selection or {}).get("notes", ()), *warned]},
                inputs=dict(inputs or {}),
                proof=_proof(initialisation, loading.get("dtype")) if verify else {"note": "not loaded and not compared (verify=False)"},
            )

        def prove(written: Path) -> None:
            prove_bytes(plan, written)
            if seen is not None:
                model = checkpoint.load_model(written, **loading)
                compare(seen, observe(model, random_inputs(model)))

        return write_checkpoint(target, on_disk, plan, config, record, prove if verify else None, extra, quiet)


def _proof(initialisation: str, dtype: str | None) -> dict[str, Any]:
    if not PRESERVING[initialisation]:
        return {"carried_tensors": "bit-equal", "note": f"{initialisation} changes what the model computes"}
    equal = dict.fromkeys(("carried_tensors", "logits", "decoding"), "bit-equal")
    return {**equal, "tokens": list(TOKENS), "dtype": dtype or "its own"}
