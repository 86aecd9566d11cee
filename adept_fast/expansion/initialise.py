"""Initialise a new copy. Two ways leave the logits unchanged, bit for bit; two, for research, change them, and the record says so.

zero_output: the last parameters of each branch are 0 (in post-norm models the gain of the norm after it).
zero_gate_up: the same, but in gated MLPs the up projection is 0 instead of the output projection. The gate projection keeps its values:
with both at 0 neither would ever learn.
small_random: the parameters of zero_output are normal noise around it, with 2 % of the source's root mean square.
scaled_source: they are a tenth of the source's, as `dial` with alpha 0.1 would leave them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.silent_copies import Family

NOISE, SHARE = 0.02, 0.1
UP = ".up_proj.weight"


def silent_values(family: Family, layer: int, names: Mapping[str, object], how: str) -> Mapping[str, float]:
    """Return the values that make a copy of `layer` silent: parameter name within the layer -> value. names: of the layer's parameters.

    Raises UnsupportedFamilyError where zero_gate_up is impossible: the MLP has no up_proj of its own, or a norm follows it.
    """
    silent = family.silent[layer]
    if how != "zero_gate_up":
        return silent
    ups = [name for name in names if name.endswith(UP)]
    inside = tuple(name.removesuffix("up_proj.weight") for name in ups)
    within = {name for name in silent if name.startswith(inside) and not name.endswith("bias")} if inside else set()
    if not within or family.gains[layer]:
        reason = "a norm comes behind its branches" if family.gains[layer] else f"layer {layer} has no MLP with an up_proj of its own"
        raise UnsupportedFamilyError(f"{family.name}: cannot be expanded by zero_gate_up: {reason}: use zero_output")
    return {**{name: value for name, value in silent.items() if name not in within}, **dict.fromkeys(ups, 0.0)}


def initial_values(source: Tensor, silent: float, how: str, name: str) -> Tensor:
    """Return the initial values of a tensor that zero_output fills with `silent`, in the dtype of `source`. name: seeds the noise."""
    if PRESERVING[how]:
        return torch.full_like(source, silent)
    if how == "scaled_source":
        return (SHARE * source.double() + (1 - SHARE) * silent).to(source.dtype)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)
    return (silent + NOISE * source.double().cpu().square().mean().sqrt() * noise).to(source)
