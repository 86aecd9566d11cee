"""The formulas in plain torch: every fast backend is tested against these functions, and they are what runs where none is available."""

from adept_fast.reference.adamw import (
    AdamWOptions,
    Update,
    adamw_,
    adamw_update_,
    clip_scale,
    join_master,
    needs_master,
    power,
    split_master,
    stochastic_round,
    sum_of_squares,
)
from adept_fast.reference.losses import Projection, RowLosses, accumulator, linear_cross_entropy, logits
from adept_fast.reference.saliency import saliency_sums

__all__ = [
    "AdamWOptions",
    "Projection",
    "RowLosses",
    "Update",
    "accumulator",
    "adamw_",
    "adamw_update_",
    "clip_scale",
    "join_master",
    "linear_cross_entropy",
    "logits",
    "needs_master",
    "power",
    "saliency_sums",
    "split_master",
    "stochastic_round",
    "sum_of_squares",
]
