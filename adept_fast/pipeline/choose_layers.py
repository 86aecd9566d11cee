"""Which layers a recipe copies: as given, evenly or by their scores. The copies of a model that is expanded already are not copied."""

from __future__ import annotations

from typing import Any

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, layer_indices
from adept_fast.pipeline.recipe import section
from adept_fast.pipeline.run_directory import Workspace
from adept_fast.runtime.strict_json import finite
from adept_fast.scoring.budget import LayerCosts, check_budget
from adept_fast.scoring.race import Race
from adept_fast.scoring.scores import LayerScores
from adept_fast.scoring.select_layers import check_choice, evenly, next_layer, select_layers, undecided


def check_layers(work: Workspace) -> None:
    """Raise InputError where what the recipe says of layers does not fit those of its model."""
    expand, layers, candidates = work.recipe.expand, len(decoder_layers(work.skeleton)), _candidates(work)
    for name, given in (("score.unit_layers", work.recipe.score.unit_layers), ("expand.layers", expand.layers)):
        if given is not None:
            layer_indices(given, layers, name)
    if expand.layers is None:
        with section("expand"):
            check_choice(len(candidates), expand.k, expand.placement)
    if expand.budget is not None:
        with section("expand"):
            check_budget(expand.budget.shares, LayerCosts.of(work.skeleton), candidates)
    if (raced := race(work)) is not None:
        with section("score"), section("expand"):
            raced.check(len(candidates))


def race(work: Workspace) -> Race | None:
    """For the expand.k lowest layers, where the recipe asks for one."""
    score = work.recipe.score
    return None if score.regret is None else Race(work.recipe.expand.k, score.regret, score.confidence)


def by_scores(work: Workspace) -> bool:
    return work.method.copies and work.recipe.expand.layers is None and not work.method.uniform


@section("expand")
def choose(work: Workspace, scores: LayerScores | None) -> list[int]:
    """The layers to copy, ascending. Raises InputError where the recipe has them chosen by scores, and there are none."""
    expand = work.recipe.expand
    if expand.layers is not None:
        return sorted(expand.layers)
    if work.method.uniform:
        return evenly(_candidates(work), expand.k)
    if scores is None:
        raise InputError(f"{work.scores_path}: no scores yet: run adept-fast score first, or set expand.layers")
    how = {"k": expand.k} if expand.budget is None else {"budget": expand.budget.shares}
    return select_layers(scores, placement=expand.placement, **how)


def selection(work: Workspace, layers: list[int], scores: LayerScores | None) -> dict[str, Any]:
    """How the layers were chosen, for the record."""
    placement = work.recipe.expand.placement
    if scores is None or not by_scores(work):
        return {"placement": "uniform" if work.method.uniform else "given", "k": len(layers), "notes": []}
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


def _candidates(work: Workspace) -> list[int]:
    copies = work.earlier.copies if work.earlier else ()
    return [layer for layer in range(len(decoder_layers(work.skeleton))) if layer not in copies]
