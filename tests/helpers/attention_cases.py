"""Small models with each way to normalise queries and keys, and with caps, sinks, other orders of norms and rotary
parameters by layer type."""

WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
BY_TYPE = {
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    **WINDOWS,
}  # fmt: skip
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    }
}  # fmt: skip
NORMED = {
    "norms by head": {"qk_norm": "head", "num_key_value_heads": 2},
    "norms by head after the rotation": {"qk_norm": "head", "qk_norm_after_rotation": True, **YARN},
    "norms of all heads": {"qk_norm": "joint", "num_key_value_heads": 2},
    "norms of all heads after the rotation": {"qk_norm": "joint", "qk_norm_after_rotation": True, **YARN},
    "layer norms by head": {"qk_norm": "head", "qk_norm_type": "layer_norm", "qk_norm_bias": True, **HALF},
    "layer norms of all heads": {"qk_norm": "joint", "qk_norm_type": "layer_norm", "num_key_value_heads": 3},
    "layer norms of all heads after the rotation": {
        "qk_norm": "joint", "qk_norm_type": "layer_norm", "qk_norm_after_rotation": True, "qk_norm_bias": True,
        "num_key_value_heads": 2, **HALF,
    },
    "norms without weights": {"qk_norm": "head", "qk_norm_affine": False, "qk_norm_after_rotation": True},
    "norms without rotation": {"qk_norm": "head", "rope_layers": [True, False, True]},
    "norms of chosen frequencies": {
        "qk_norm": "head", "qk_head_dim": [8, 12, 6], "rope_frequencies": [[0, 1, 2, 3], [0, 1, 1, 2], [3, 2]],
    },
    "norms of wide heads": {"qk_norm": "joint", "qk_head_dim": [8, 16, 24], "v_head_dim": [24, 8, 12]},
    "norms, alibi": {
        "qk_norm": "head", "position_embedding": "alibi", "alibi_slopes": [0.5, 0.25, 0.1, 0.05, 0.01, 0.002],
    },
}  # fmt: skip
MAPS = {"query_maps": True, "key_bias": True, "qk_norm": "head"}
MAPPED = {
    "query maps": {**MAPS, "qk_norm_affine": False, "num_key_value_heads": 2},
    "query maps, chosen frequencies": {
        **MAPS, "qk_norm_affine": False, "qk_head_dim": [8, 12, 6],
        "rope_frequencies": [[0, 1, 2, 3], [0, 1, 1, 2], [3, 2]],
    },
    "query maps, layer norms, half rotary": {**MAPS, "qk_norm_type": "layer_norm", "qk_norm_bias": True, **HALF},
    "query maps, wide heads": {**MAPS, "qk_norm": "joint", "qk_head_dim": [8, 16, 24], "v_head_dim": 16},
    "query maps, two rotations": {**MAPS, "attention_softcap": 0.7, **BY_TYPE},
}  # fmt: skip
CAPPED = {
    "capped attention": {"attention_softcap": 0.7, "num_key_value_heads": 2},
    "capped attention, windows": {"attention_softcap": 0.7, **WINDOWS},
    "capped attention, relative": {
        "attention_softcap": 0.7, "position_embedding": "relative", "relative_buckets": 8, "relative_max_distance": 20,
    },
}  # fmt: skip
WITH_SINKS = {
    "sinks": {"attention_sinks": True, "num_key_value_heads": 2},
    "sinks, windows, multi-head": {"attention_sinks": True, "num_key_value_heads": 6, **WINDOWS},
    "sinks, narrow values": {"attention_sinks": True, "v_head_dim": 12, **HALF},
    "sinks, alibi": {
        "attention_sinks": True, "position_embedding": "alibi",
        "alibi_slopes": [0.5, 0.25, 0.1, 0.05, 0.01, 0.002], "positions_from_mask": True,
    },
    "sinks and caps": {"attention_sinks": True, "attention_softcap": 0.7, **WINDOWS},
}  # fmt: skip
OTHERS = {
    "capped logits": {"logit_softcap": 1.5, "logit_scale": 0.5},
    "norms on both sides": {"residual": "sandwich", "residual_multiplier": 0.7, "mlp_bias": True, "output_bias": True},
    "norms of outputs": {"residual": "output_norm"},
    "layer norms of outputs": {"residual": "output_norm", "norm_type": "layer_norm", "gated_mlp": False},
    "two rotations": {"num_key_value_heads": 2, **BY_TYPE},
    "two rotations, wide heads": {"qk_head_dim": [8, 16, 24], "v_head_dim": 16, **BY_TYPE},
    "two rotations, chosen frequencies": {
        "qk_head_dim": [8, 12, 6], "rope_frequencies": [[4, 5, 6, 7], [0, 1, 1, 2], [7, 6]], **BY_TYPE,
    },
    "two rotations, one layer without": {"rope_layers": [True, False, True], "qk_norm": "head", **BY_TYPE},
    "scaled queries": {"query_scaling_beta": 0.5, "query_scaling_length": 4},
    "scaled queries, caps and norms": {
        "query_scaling_beta": 0.5, "query_scaling_length": 4, "attention_softcap": 0.7, "qk_norm": "head",
        "residual": "sandwich", "logit_softcap": 1.5,
    },
    "a gate": {"attention_gate": True, "num_key_value_heads": 2, "qk_norm": "head"},
    "a gate, narrow values, parallel": {
        "attention_gate": True, "v_head_dim": 12, "residual": "parallel_shared_norm", "attention_sinks": True,
    },
    "clipped": {"clip_qkv": 0.4, "num_key_value_heads": 2, "query_bias": True, "key_bias": True, "value_bias": True},
    "clipped and normalised": {"clip_qkv": 0.4, "qk_norm": "head"},
    "a layer before the head, no first norm": {
        "head_transform": "gelu", "head_transform_bias": True, "first_norm": False, "norm_type": "layer_norm",
        "embedding_norm": True, "lm_head_bias": True,
    },
    "a norm before positions, an output bias in the last layer": {
        "embedding_norm": True, "embedding_norm_first": True, "position_embedding": "learned",
        "output_bias": [False, False, True],
    },
}  # fmt: skip
ATTENTION_CASES = {**NORMED, **MAPPED, **CAPPED, **WITH_SINKS, **OTHERS}
