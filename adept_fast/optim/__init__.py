"""AdamW with one learning rate per unit: adamw.py steps, update_collection.py collects the updates, ops/adamw/op.py runs them."""

from adept_fast.optim.adamw import AdamW

__all__ = ["AdamW"]
