"""Stage 1: which layers general competence rests on."""

from adept_fast.importance.layers import METHODS, score_layers
from adept_fast.importance.masking import LOSSES
from adept_fast.importance.race import Race, certified
from adept_fast.importance.scores import LayerScores, Profile
from adept_fast.importance.selection import PLACEMENTS, check_choice, select_layers, undecided

__all__ = [
    "LOSSES",
    "METHODS",
    "PLACEMENTS",
    "LayerScores",
    "Profile",
    "Race",
    "certified",
    "check_choice",
    "score_layers",
    "select_layers",
    "undecided",
]
