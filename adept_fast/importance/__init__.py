"""Stage 1: which layers general competence rests on."""

from adept_fast.importance.budget import LayerCosts, check_budget
from adept_fast.importance.cheap import CHEAP
from adept_fast.importance.comparison import compare_scores
from adept_fast.importance.layers import METHODS, score_layers
from adept_fast.importance.masking import LOSSES
from adept_fast.importance.race import Race, certified
from adept_fast.importance.scores import LayerScores, Profile, UnitScores
from adept_fast.importance.selection import PLACEMENTS, check_choice, evenly, next_layer, select_layers, undecided
from adept_fast.importance.settings import check_scoring
from adept_fast.importance.stability import corpus_conflicts, selection_stability
from adept_fast.importance.unit_masking import GRANULARITIES, forwards, mask_units, masked_units

__all__ = [
    "CHEAP",
    "GRANULARITIES",
    "LOSSES",
    "METHODS",
    "PLACEMENTS",
    "LayerCosts",
    "LayerScores",
    "Profile",
    "Race",
    "UnitScores",
    "certified",
    "check_budget",
    "check_choice",
    "check_scoring",
    "compare_scores",
    "corpus_conflicts",
    "evenly",
    "forwards",
    "mask_units",
    "masked_units",
    "next_layer",
    "score_layers",
    "select_layers",
    "selection_stability",
    "undecided",
]
