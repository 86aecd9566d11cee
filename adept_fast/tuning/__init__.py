"""Stage 2: tune the copies, each unit at its own learning rate."""

from adept_fast.tuning.adept_callback import AdeptCallback
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.baselines import check_rank, tune_baseline
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.kl_anchor import Anchor
from adept_fast.tuning.param_group_rates import rate_groups
from adept_fast.tuning.training_plan import plan
from adept_fast.tuning.training_run import Bookkeeping
from adept_fast.tuning.tune_checkpoint import tune_checkpoint
from adept_fast.tuning.tuning_settings import TuningSettings, check_meter, check_settings
from adept_fast.tuning.unit_rates import MAPS, RateRule, apply_rates, unit_rates

__all__ = [
    "MAPS",
    "AdeptCallback",
    "AdeptTrainer",
    "RateRule",
    "Anchor",
    "Bookkeeping",
    "TuningSettings",
    "apply_rates",
    "check_meter",
    "check_rank",
    "check_settings",
    "fast_step",
    "plan",
    "rate_groups",
    "tune_baseline",
    "tune_checkpoint",
    "unit_rates",
]
