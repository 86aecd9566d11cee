"""Choose the layers that a recipe copies: as given, evenly spaced, or by their scores. Copies of an earlier expansion are never copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, layer_indices
from adept_fast.pipeline.recipe import Recipe, section
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.budget import LayerCosts, check_budget, within
from adept_fast.scoring.race import Race
from adept_fast.scoring.scores import LayerScores
from adept_fast.scoring.select_layers import check_choice, evenly, next_layer, select_layers, undecided
from adept_fast.tuning.methods import METHODS


def check_layers(recipe: Recipe, source: SourceModel) -> None:
    """Raise InputError if the recipe's layers do not fit those of its model."""
    expand, layers, candidates = recipe.expand, len(decoder_layers(source.skeleton)), _candidates(source)
    for name, given in (("score.unit_layers", recipe.score.unit_layers), ("expand.layers", expand.layers)):
        if given is not None:
            layer_indices(given, layers, name)
    if expand.layers is None:
        with section("expand"):
            check_choice(len(candidates), expand.k, expand.placement)
    if expand.budget is not None:
        with section("expand"):
            check_budget(expand.budget.shares, LayerCosts.of(source.skeleton), candidates)
    if (raced := race(recipe)) is not None:
        with section("score"), section("expand"):
            raced.check(len(candidates))


def race(recipe: Recipe) -> Race | None:
    """Return the race for the expand.k lowest layers, or None if the recipe asks for none."""
    score = recipe.score
    return None if score.regret is None else Race(recipe.expand.k, score.regret, score.confidence)


def by_scores(recipe: Recipe) -> bool:
    method = METHODS[recipe.method]
    return method.copies and recipe.expand.layers is None and not method.uniform


@section("expand")
def choose(recipe: Recipe, source: SourceModel, scores: LayerScores | None, where: Path) -> list[int]:
    """Return the layers to copy, ascending. where: path of scores.json. Raises InputError if scores are needed and missing."""
    expand = recipe.expand
    if expand.layers is not None:
        return sorted(expand.layers)
    if METHODS[recipe.method].uniform:
        return evenly(_candidates(source), expand.k)
    if scores is None:
        raise InputError(f"{where}: no scores yet: run adept-fast score first, or set expand.layers")
    how = {"k": expand.k} if expand.budget is None else {"budget": expand.budget.shares}
    return select_layers(scores, placement=expand.placement, **how)


def unscored(recipe: Recipe, source: SourceModel) -> list[int]:
    """Return as many layers as the recipe copies, evenly spaced, to stand in for those that scores will choose."""
    budget, candidates = recipe.expand.budget, _candidates(source)
    if budget is None:
        return evenly(candidates, recipe.expand.k)
    return within(budget.shares, LayerCosts.of(source.skeleton), [evenly(candidates, 1 + more) for more in range(len(candidates))])


def selection(recipe: Recipe, layers: list[int], scores: LayerScores | None) -> dict[str, Any]:
    """Describe for the record how the layers were chosen."""
    placement = recipe.expand.placement
    if scores is None or not by_scores(recipe):
        return {"placement": "uniform" if METHODS[recipe.method].uniform else "given", "k": len(layers), "notes": []}
    rivals = ", ".join(map(str, undecided(scores, layers, placement)))
    found: dict[str, Any] = {
        "placement": placement,
        "k": len(layers),
        "notes": [f"the intervals do not part the chosen layers from {rivals}: more probe items might"] if rivals else [],
        "method": scores.method,
        "loss": scores.loss,
        "scores": finite([scores.values[layer] for layer in layers]),
    }
    if scores.costs is not None:
        found |= {"next": finite(next_layer(scores, layers, placement)), "shares": scores.costs.shares(layers)}
    return found


def _candidates(source: SourceModel) -> list[int]:
    copies = source.earlier.copies if source.earlier else ()
    return [layer for layer in range(len(decoder_layers(source.skeleton))) if layer not in copies]
