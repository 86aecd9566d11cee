"""AdamW with one learning rate per unit: adamw.py steps, update_collection.py collects the updates, ops/adamw/op.py runs them."""

from adept_fast.optim.adamw import AdamW
from adept_fast.optim.param_groups import param_groups

__all__ = ["AdamW", "param_groups"]
