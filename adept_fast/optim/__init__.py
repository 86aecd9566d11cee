"""AdamW with one learning rate per unit: adamw.py steps, update_collection.py collects the updates, ops/adamw/op.py runs them.

offload.py steps parameters of a GPU on the CPU.
"""

from adept_fast.optim.adamw import AdamW
from adept_fast.optim.offload import OffloadedAdamW
from adept_fast.optim.param_groups import param_groups

__all__ = ["AdamW", "OffloadedAdamW", "param_groups"]
