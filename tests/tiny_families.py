"""The tiny config.json of every model family, in its own words: test_every_family.py proves each one's table on it.

Every size differs from every other that it could be mistaken for; no family has fewer than 3 layers or 6 experts.
"""

from tiny import QWEN3_NEXT, VOCAB_SIZE

from slimqwen.families import Config

COMMON: Config = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "dtype": "float32",
}

QWEN3_MOE: Config = COMMON | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}

OLMOE: Config = COMMON | {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "intermediate_size": 16,
    "num_experts": 6,
    "norm_topk_prob": False,
    "attention_bias": False,
    "clip_qkv": 2.0,
}

MIXTRAL: Config = COMMON | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "head_dim": None,
    "intermediate_size": 16,
    "num_local_experts": 6,
    "sliding_window": 8,
}

QWEN3_5_MOE_TEXT: Config = {
    key: value
    for key, value in QWEN3_NEXT.items()
    if key not in ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "intermediate_size")
} | {
    "model_type": "qwen3_5_moe_text",
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}

QWEN3_5_MOE: Config = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": VOCAB_SIZE - 4,
    "video_token_id": VOCAB_SIZE - 3,
    "vision_start_token_id": VOCAB_SIZE - 2,
    "vision_end_token_id": VOCAB_SIZE - 1,
    "tie_word_embeddings": False,
    "text_config": {key: value for key, value in QWEN3_5_MOE_TEXT.items() if key != "architectures"},
    "vision_config": {
        "model_type": "qwen3_5_moe_vision",
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
    },
}

GLM4_MOE: Config = {key: value for key, value in COMMON.items() if key != "router_aux_loss_coef"} | {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "head_dim": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "num_nextn_predict_layers": 1,
}

FAMILIES_NATIVE: dict[str, Config] = {
    native["model_type"]: native
    for native in (QWEN3_NEXT, QWEN3_MOE, OLMOE, MIXTRAL, QWEN3_5_MOE_TEXT, QWEN3_5_MOE, GLM4_MOE)
}
