"""Stage 1: which layers general competence rests on."""

from adept_fast.scoring.budget import LayerCosts, check_budget
from adept_fast.scoring.method_comparison import compare_scores
from adept_fast.scoring.race import Race, certified
from adept_fast.scoring.score_layers import score_layers
from adept_fast.scoring.scores import LayerScores, UnitScores
from adept_fast.scoring.select_layers import check_choice, evenly, next_layer, select_layers, undecided
from adept_fast.scoring.stability import corpus_conflicts, selection_stability
from adept_fast.scoring.unit_masking import forwards, mask_units, masked_units

__all__ = [
    "LayerCosts",
    "LayerScores",
    "Race",
    "UnitScores",
    "certified",
    "check_budget",
    "check_choice",
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
