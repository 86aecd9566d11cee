"""Projections that hold several in one tensor: which rows belong to which part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def head_size(config: PretrainedConfig) -> int:
    """Rows of one attention head; 1 where the config names no heads."""
    heads = vars(config).get("num_attention_heads") or vars(config).get("n_head") or config.hidden_size
    return vars(config).get("head_dim") or config.hidden_size // heads


def fused_rows(config: PretrainedConfig, module: str, rows: int) -> list[tuple[str, int]]:
    """Parts of a fused projection as (name, rows), in order; a projection that is not fused is one part with an empty name.

    Layouts other than query, key, value one after the other (interleaved by head, as in GPT-NeoX) stay one part.
    """
    if module == "qkv_proj" and vars(config).get("num_key_value_heads"):
        queries, keys = config.num_attention_heads * head_size(config), config.num_key_value_heads * head_size(config)
        if queries + 2 * keys == rows:
            return [("q", queries), ("k", keys), ("v", keys)]
    if module == "gate_up_proj":
        return [("gate", rows // 2), ("up", rows // 2)]
    return [("", rows)]
