"""The values that settings of a checkpoint may have."""

from __future__ import annotations

DTYPES = ("bfloat16", "float16", "float32", "float64")
PRESERVING = {"zero_output": True, "zero_gate_up": True, "small_random": False, "scaled_source": False}
"""Ways to initialise a copy -> whether the model's outputs stay the same."""
