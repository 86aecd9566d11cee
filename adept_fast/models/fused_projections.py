"""Find which rows of a fused projection belong to which part, and to which head of it.

    one after the other       q, k, v        qkv_proj (phi3), c_attn (gpt2, gpt_bigcode with multi_query), Wqkv (mpt)
    per group of heads        [groups, queries of the group + key + value, head size]
                              query_key_value (a group a head in bloom, gpt_neox, persimmon; falcon); gpt_bigcode without multi_query
    in four blocks            [4, q + v + k]  qkv_proj of codegen, whose weights were split over four devices
    per head                  q, gate         q_proj of qwen3_next and qwen3_5;     k, v   kv_b_proj of latent attention (deepseek)
    halves                    gate, up        gate_up_proj, input_linear, of experts too

Source: the forward of each family in transformers; tests/models/test_fused_projections.py perturbs each part and checks which head changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GATE_UP = ("gate_up_proj", "input_linear")
FUSED_ATTENTION = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


class Part(NamedTuple):
    """A part of a projection. rows: int64, head after head; head: rows per head."""

    name: str
    rows: Tensor
    head: int


def head_size(config: PretrainedConfig) -> int:
    """Return the rows of one attention head; 1 if the config names no heads."""
    return vars(config).get("head_dim") or config.hidden_size // (_heads(config) or config.hidden_size)


def fused_rows(config: PretrainedConfig, module: str, rows: int, head: int | None = None) -> list[Part]:
    """Split a projection of `rows` rows into parts, by the name of its module. One that is not fused is a single part named "".

    head: rows per head, if the module's differ from the config's
    """
    head = head or head_size(config)
    whole = [Part("", torch.arange(rows), head)]
    heads = _heads(config)
    if module in GATE_UP and rows % 2 == 0:
        return _parts(1, [("gate", 1, rows // 2), ("up", 1, rows // 2)])
    if not heads:
        return whole
    nope, rotary, values = (vars(config).get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if nope and rotary and module in ("q_proj", "q_b_proj") and rows == heads * (nope + rotary):
        return [Part("", torch.arange(rows), nope + rotary)]
    if nope and values and module == "kv_b_proj" and rows == heads * (nope + values):
        return _parts(heads, [("k", 1, nope), ("v", 1, values)])
    if nope and values and module == "o_proj" and rows == heads * values:
        return [Part("", torch.arange(rows), values)]
    if module == "q_proj" and rows == 2 * heads * head:
        return _parts(heads, [("q", 1, head), ("gate", 1, head)])
    if module not in FUSED_ATTENTION:
        return whole
    keys, odd = divmod(rows - heads * head, 2 * head)
    if odd or keys < 1 or heads % keys:
        return whole
    if config.model_type == "codegen":
        return _parts(4, [(name, heads // 4, head) for name in ("q", "v", "k")])
    apart = module == "query_key_value" or (module == "c_attn" and vars(config).get("multi_query") is False)
    groups = keys if apart else 1
    return _parts(groups, [("q", heads // groups, head), ("k", keys // groups, head), ("v", keys // groups, head)])


def _heads(config: PretrainedConfig) -> int | None:
    return next(filter(None, (vars(config).get(key) for key in ("num_attention_heads", "n_head", "n_heads"))), None)


def _parts(groups: int, parts: list[tuple[str, int, int]]) -> list[Part]:
    """Split rows that repeat `parts`, each (name, heads in a group, rows per head), `groups` times."""
    lengths = [heads * size for _, heads, size in parts]
    split = torch.arange(groups * sum(lengths)).view(groups, -1).split(lengths, 1)
    return [Part(name, rows.flatten(), size) for (name, _, size), rows in zip(parts, split, strict=True)]
