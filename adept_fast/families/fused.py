"""Projections that hold several in one tensor: which rows belong to which part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def fused_rows(config: PretrainedConfig, module: str, rows: int) -> list[tuple[str, int]]:
    """Parts of a fused projection as (name, rows), in order; a projection that is not fused is one part with an empty name."""
    if module == "qkv_proj":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        return [("q", queries), ("k", keys), ("v", keys)]
    if module == "gate_up_proj":
        return [("gate", rows // 2), ("up", rows // 2)]
    return [("", rows)]
