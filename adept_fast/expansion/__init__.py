"""The expanded model: silent copies of chosen layers, in memory or on disk, proven."""

from adept_fast.expansion.first_rates import first_importance, load_first_importance
from adept_fast.expansion.insert import ParameterCounts, copies, expand_model, freeze_original
from adept_fast.expansion.verify import verify_expansion
from adept_fast.expansion.write import expand_checkpoint

__all__ = [
    "ParameterCounts",
    "copies",
    "expand_checkpoint",
    "expand_model",
    "first_importance",
    "freeze_original",
    "load_first_importance",
    "verify_expansion",
]
