"""Expand a model with silent copies of chosen layers, in memory or on disk, and edit, verify and export the result."""

from adept_fast.expansion.bypass import bypassed
from adept_fast.expansion.delta import apply_copies, extract_copies
from adept_fast.expansion.dial import dial, dialled_model
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import copies, expand_model, freeze_original
from adept_fast.expansion.export import export_tuned
from adept_fast.expansion.first_importance import first_importance, load_first_importance
from adept_fast.expansion.initialise import PRESERVING
from adept_fast.expansion.merge import merge_copies
from adept_fast.expansion.remove import remove_copies
from adept_fast.expansion.verify import largest_difference, verify_expansion

__all__ = [
    "PRESERVING",
    "apply_copies",
    "bypassed",
    "copies",
    "dial",
    "dialled_model",
    "expand_checkpoint",
    "expand_model",
    "export_tuned",
    "extract_copies",
    "first_importance",
    "freeze_original",
    "largest_difference",
    "load_first_importance",
    "merge_copies",
    "remove_copies",
    "verify_expansion",
]
