"""The second stage of a run: expanded/, the model with silent copies of the chosen layers, verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.errors import ExpansionError, InputError
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.verify import largest_difference, verify_expansion
from adept_fast.pipeline.choose_layers import choose, selection
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.recipe import Recipe, section
from adept_fast.pipeline.run_directory import RunDirectory
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.scoring.scores import LayerScores
from adept_fast.tuning.methods import METHODS

logger = logging.getLogger(__name__)


@section("expand")
def expand(recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory, scores: LayerScores | None = None) -> AdeptConfig:
    """Write expanded/ and return its record. scores: choose the layers by these; None: by scores.json of output_dir."""
    if not METHODS[recipe.method].copies:
        raise InputError(f"method={recipe.method} trains no copies: there is nothing to expand")
    if scores is None:
        scores = directory.kept(directory.scores, LayerScores.load, {"model": source.identity}, source.name, whole=False)
    layers = choose(recipe, source, scores, directory.scores)
    if kept := kept_expansion(recipe, source, data, directory, layers):
        return kept
    how = selection(recipe, layers, scores)
    if "shares" in how:
        logger.info("shares of full training: parameters {parameters:.1%}, time {time:.0%} (modelled)".format(**how["shares"]))
    for note in how["notes"]:
        logger.warning(note)
    record = expand_checkpoint(
        source.folder,
        directory.expanded,
        layers,
        name=source.name,
        selection=how,
        steering=data.items(data.steering()),
        initialisation=recipe.expand.initialisation,
        inputs=_inputs(recipe, source, data, layers),
        models=source.models,
    )
    trainable, total = record.parameters["trainable"], record.parameters["total"]
    share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
    logger.info(f"{directory.expanded}: copies of layers {layers}; {_equality(record)}; {share} will train")
    return record


def kept_expansion(
    recipe: Recipe, source: SourceModel, data: Datasets, directory: RunDirectory, layers: Sequence[int]
) -> AdeptConfig | None:
    """Return the record of expanded/ if output_dir has it. Raises InputError if it was made from something else."""
    return directory.kept(directory.expanded, AdeptConfig.load, _inputs(recipe, source, data, layers), source.name)


def _inputs(recipe: Recipe, source: SourceModel, data: Datasets, layers: Sequence[int]) -> dict[str, Any]:
    return {**source.inputs, **recipe.copied(layers), "steering items": data.digest(data.steering())}


def expanded_record(source: SourceModel, directory: RunDirectory) -> AdeptConfig:
    """Return the record of expanded/. Raises InputError if it is missing or belongs to another model."""
    record = directory.kept(directory.expanded, AdeptConfig.load, {"model": source.identity}, source.name, whole=False)
    if record is None:
        raise InputError(f"{directory.expanded}: missing: run adept-fast expand first (the same recipe), or adept-fast run for all stages")
    return record


def verify(recipe: Recipe, source: SourceModel, directory: RunDirectory) -> None:
    """Load base and expanded model anew and require equal logits; with an initialisation that changes them, log how far they differ."""
    record, folder = expanded_record(source, directory), directory.expanded
    base, expanded = source.models.take(source.folder), source.models.take(folder)
    if not PRESERVING[record.initialisation]:
        far = f"by up to {largest_difference(base, expanded):.3g} from those of {source.name}"
        logger.info(f"{folder}: {_equality(record)}: logits differ {far}")
        return
    try:
        verify_expansion(base, expanded)
    except ExpansionError as error:
        raise InputError(f"{folder}: {error}: it was changed since it was written: restore it, or expand the model again") from error
    logger.info(f"{folder}: logits bit-equal to {source.name} in {recipe.dtype or 'its own dtype'}, cached decoding too")


def _equality(record: AdeptConfig) -> str:
    if PRESERVING[record.initialisation]:
        return "logits bit-equal"
    return f"{record.initialisation} changes what the model computes"
