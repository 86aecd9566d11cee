"""AdamW with one learning rate per unit: the class, its state, and the way of an update from tensors to a backend."""

from adept_fast.optim.adamw import AdamW

__all__ = ["AdamW"]
