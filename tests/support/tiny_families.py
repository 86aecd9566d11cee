"""A tiny random model of each type that transformers knows, from its config class with every size shrunk."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

LAYERS = 4
VOCABULARY = 96
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL = {
    # shape
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "lru_width", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "attention_head_dim", "global_head_dim", "dim_head", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "index_n_heads", "o_groups"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "dff", "dim_ff", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "d_rel"), 4),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # state-space
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 2),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    # windows and positions
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk", "index_topk_blocks", "rel_extent", "block_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "context_length"), 128),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
"""Field -> tiny value, used where a type's config has the field."""

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
NONE_MEANS_DERIVED = ("head_dim", "num_key_value_heads")


def _small(config: PretrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            fields[name] = _small(value)
        elif name in SMALL and (value is not None or name in NONE_MEANS_DERIVED) and not isinstance(value, (list, tuple, dict)):
            fields[name] = SMALL[name]
        elif name in PER_LAYER and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            fields[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    if fields.get("qk_rope_head_dim"):  # latent attention: as many keys as queries, and head_dim is that of the rotated part
        fields |= {"num_key_value_heads": fields["num_attention_heads"], "head_dim": fields["qk_rope_head_dim"]}
    return fields


DOTS3 = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    **{"swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 4, "swa_v_head_dim": 8},
}
QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 2},
    **{"ngram_vocab_size_base": 100, "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8},
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": DOTS3,
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"hidden_size": 32, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"hidden_size": 32, "adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        **{"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
        **{"attn_layers": ["local"] * 4, "local_attn_chunk_length": 8, "feed_forward_size": 48},
    },
    "megatron-bert": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xmod": {"is_decoder": True, "default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs beside: sizes that depend on one another, or a default without which nothing runs."""


def config(model_type: str, **changes: Any) -> PretrainedConfig:
    fields = _small(AutoConfig.for_model(model_type))
    for name, value in {**EXCEPTIONS.get(model_type, {}), **changes}.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) and name.endswith("_config") else value
    return AutoConfig.for_model(model_type, **fields)


def model(model_type: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Random weights, biases and norms (neutral ones would hide faults), large enough that every layer matters."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(model_type, **changes))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + 0.2 * noise if one else 0.2 * noise)
    return made.eval()
