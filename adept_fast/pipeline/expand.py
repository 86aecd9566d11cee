"""The second stage of a run: expanded/, silent copies of the chosen layers, proven."""

from __future__ import annotations

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.errors import InputError
from adept_fast.expansion import PRESERVING, expand_checkpoint, largest_difference, verify_expansion
from adept_fast.pipeline.choose_layers import choose, selection
from adept_fast.pipeline.recipe import section
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.scoring.scores import LayerScores


@section("expand")
def expand(work: Workspace) -> AdeptConfig:
    """expanded/ and its record."""
    if not work.method.copies:
        raise InputError(f"method={work.recipe.method} trains no copies: there is nothing to expand")
    scores = work.kept(work.scores_path, LayerScores.load)
    layers = choose(work, scores)
    steering = work.corpora.steering()
    inputs = {**work.base_inputs(), **work.copies_inputs(layers), "steering items": work.corpora.digest(steering)}
    if kept := work.kept(work.expanded, AdeptConfig.load, inputs):
        return kept
    how = selection(work, layers, scores)
    if "shares" in how:
        work.say("shares of full training: parameters {parameters:.1%}, time {time:.0%} (modelled)".format(**how["shares"]))
    for note in how["notes"]:
        work.say(note)
    record = expand_checkpoint(
        work.source,
        work.expanded,
        layers,
        name=work.recipe.model_name_or_path,
        selection=how,
        steering=work.items(steering),
        initialisation=work.recipe.expand.initialisation,
        inputs=inputs,
        **work.loading,
    )
    trainable, total = record.parameters["trainable"], record.parameters["total"]
    share = f"{trainable:,} of {total:,} parameters ({trainable / total:.1%})"
    work.say(f"{work.expanded}: copies of layers {layers}; {_equality(record)}; {share} will train")
    return record


def verify(work: Workspace) -> None:
    """Fresh loads of base and expanded: bit-equal logits, or how far they differ where the initialisation is to change them."""
    record = work.copies()
    base, expanded, name = work.load(work.source), work.load(work.expanded), work.recipe.model_name_or_path
    if not PRESERVING[record.initialisation]:
        far = f"by up to {largest_difference(base, expanded):.3g} from those of {name}"
        work.say(f"{work.expanded}: {_equality(record)}: logits differ {far}")
        return
    verify_expansion(base, expanded)
    work.say(f"{work.expanded}: logits bit-equal to {name} in {work.recipe.dtype or 'its own dtype'}, cached decoding too")


def _equality(record: AdeptConfig) -> str:
    if PRESERVING[record.initialisation]:
        return "logits bit-equal"
    return f"{record.initialisation} changes what the model computes"
