"""What a script of docs/how-to/optimizer.md must have done when it ends. Imports little, because each process of a script imports it."""

from __future__ import annotations

from typing import Any

from adept_fast import AdamW


def assert_stepped(names: dict[str, Any]) -> None:
    """The AdamW of a script, also where a trainer holds or wraps it, has stepped every parameter and has unit rates."""
    held = names["trainer"] if "trainer" in names else names["optimizer"]
    optimizer = held.optimizers[0] if hasattr(held, "optimizers") else held
    while not isinstance(optimizer, AdamW):
        optimizer = optimizer.optimizer
    assert all(optimizer.state[p]["step"] >= 1 for group in optimizer.param_groups for p in group["params"])
    assert any("unit_lr" in group for group in optimizer.param_groups)
