"""Stage 2: the copies are tuned, each unit at a learning rate of its own."""

from adept_fast.tuning.anchor import Anchor
from adept_fast.tuning.baselines import check_rank, tune_baseline
from adept_fast.tuning.callback import AdeptCallback
from adept_fast.tuning.groups import rate_groups
from adept_fast.tuning.plan import plan
from adept_fast.tuning.rates import MAPS, RateRule, apply_rates, unit_rates
from adept_fast.tuning.run import Bookkeeping
from adept_fast.tuning.settings import TuningSettings, check_meter, check_settings
from adept_fast.tuning.step import fast_step
from adept_fast.tuning.trainer import AdeptTrainer
from adept_fast.tuning.tune import tune_checkpoint

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
