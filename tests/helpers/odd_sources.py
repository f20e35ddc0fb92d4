"""Configurations that no checkpoint has: odd numbers of heads, odd sizes, windows of 2, one layer, mixed layer types.

`odd(model_type, seed)` is the same configuration at every call.
"""

import random

from sources import ABSENT, EXPERTS, VOCAB, mixture_of, rope

# Types with a head_dim of their own; the width of the others' heads is hidden_size / num_attention_heads.
OWN_WIDTH = {
    "exaone4", "gemma2", "gemma3_text", "glm4", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder",
    "ministral3", "nanochat", "qwen3", "vaultgemma",
}  # fmt: skip
# Classes that want hidden_size to be a multiple of the query heads all the same.
DIVISIBLE = {"gemma2", "gemma3_text", "hyperclovax", "internlm3", "iquestcoder", "vaultgemma"}
WINDOWED = {"exaone4", "gemma2", "gemma3_text", "granite_swa", "olmo3", "qwen3", "vaultgemma"}
BY_TYPE = {"gemma3_text", "olmo3"}  # rotary parameters by layer type
PARTIAL = {"glm4", "persimmon", "phi", "stablelm"}
MULTIPLIED = {"granite_swa", "hyperclovax"}
LAYER_NORMS = {"cohere", "persimmon", "phi", "stablelm"}
OLDER = ("ctrl", "gpt_neox_japanese", "modernbert-decoder")
ODD = sorted(OWN_WIDTH | WINDOWED | PARTIAL | MULTIPLIED | LAYER_NORMS | {"apertus", "olmo2"})


def scaled(draw: random.Random, kinds: tuple[str, ...] = ("default", "linear", "yarn", "llama3", "dynamic")) -> dict:
    """Rotary parameters of any of these types."""
    kind, length = draw.choice(kinds), draw.choice([4, 10, 16])
    beside = {
        "default": {},
        "linear": {"factor": draw.choice([1.5, 4.0])},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": draw.choice([2.0, 8.0]), "original_max_position_embeddings": length}
        | draw.choice([{}, {"attention_factor": 1.2}, {"beta_fast": 16.0, "beta_slow": 2.0}]),
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": length},
    }[kind]
    return rope(kind, **beside)["rope_parameters"] | {"rope_theta": draw.choice([50.0, 1e4, 5e5])}


def layers_of(draw: random.Random, model_type: str, count: int) -> dict:
    """Layer types and a window."""
    if model_type not in WINDOWED:
        return {"sliding_window": draw.choice([None, 2, 5, 40])} if model_type == "ministral3" else {}
    kinds = [draw.choice(["sliding_attention", "full_attention"]) for _ in range(count)]
    fields = {"layer_types": kinds, "sliding_window": draw.choice([2, 3, 5, 40])}
    if model_type == "qwen3":
        fields["use_sliding_window"] = True
    if model_type == "exaone4" and draw.random() < 0.3:
        fields = {"layer_types": ["full_attention"] * count, "sliding_window": None}
    return fields


def odd(model_type: str, seed: int) -> dict:
    draw = random.Random(f"{model_type} {seed}")
    H, count = draw.choice([1, 2, 3, 5, 6, 7, 9, 12]), draw.choice([1, 2, 3, 4])
    D = draw.choice([4, 6, 8, 10, 14, 22])
    if model_type in PARTIAL:
        D = draw.choice([8, 12, 20])
    own = model_type in OWN_WIDTH
    d = draw.choice([26, 35, 51, 64]) if own else H * D
    if model_type in DIVISIBLE:
        d = H * draw.choice([3, 5, 8, 11])
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": d,
        "intermediate_size": draw.choice([17, 33, 80]),
        "num_hidden_layers": count,
        "num_attention_heads": H,
        "num_key_value_heads": draw.choice([g for g in range(1, H + 1) if H % g == 0]),
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": draw.choice([None, 0]),
        "tie_word_embeddings": draw.random() < 0.4,
        "layer_norm_eps" if model_type in LAYER_NORMS else "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        **({"head_dim": D} if own else {}),
        **layers_of(draw, model_type, count),
        **special(draw, model_type, D, count),
    }
    if "rope_parameters" not in fields and draw.random() < 0.8:
        fields["rope_parameters"] = scaled(draw)
    if model_type in PARTIAL:
        rotary = draw.choice([2, 4, D // 2, D])
        fields["rope_parameters"] = rope("default", partial_rotary_factor=(rotary + 0.5) / D)["rope_parameters"]
        fields["rope_parameters"]["partial_rotary_factor"] = min(1.0, (rotary + 0.5) / D)
    if model_type in BY_TYPE:
        kinds = ("default", "linear", "yarn", "llama3")
        fields["rope_parameters"] = {name: scaled(draw, kinds) for name in ("full_attention", "sliding_attention")}
    if model_type == "persimmon":
        del fields["num_key_value_heads"]
    return fields


def special(draw: random.Random, model_type: str, head_dim: int, count: int) -> dict:
    """What a type has of its own."""

    def maybe(*names: str) -> dict:
        return {name: draw.random() < 0.5 for name in names}

    fields: dict = {}
    if model_type in MULTIPLIED:
        fields |= maybe("attention_bias", "mlp_bias") | {
            "embedding_multiplier": draw.choice([1.0, 6.0]),
            "logits_scaling": draw.choice([0.5, 3.0]),
            "residual_multiplier": draw.choice([1.0, 0.3]),
            "attention_multiplier": draw.choice([0.1, 0.5]),
        }
    if model_type in ("apertus", "cohere", "gemma2", "gemma3_text", "glm4", "hunyuan_v1_dense", "iquestcoder",
                      "nanochat", "olmo2", "olmo3", "qwen3", "vaultgemma"):  # fmt: skip
        fields |= maybe("attention_bias")
    if model_type in ("gemma2", "gemma3_text", "vaultgemma"):
        fields["query_pre_attn_scalar"] = draw.choice([3, 12, 50])
        fields["final_logit_softcapping"] = draw.choice([None, 7.0, 30.0])
        fields["attn_logit_softcapping"] = draw.choice([None, 2.0, 20.0])
    if model_type == "nanochat":
        fields["final_logit_softcapping"] = draw.choice([None, 4.0, 15.0])
    if model_type == "internlm3":
        fields["attention_bias"] = fields["mlp_bias"] = draw.random() < 0.5
    if model_type == "iquestcoder":
        fields |= maybe("mlp_bias")
    if model_type == "hyperclovax":
        fields |= maybe("use_post_norm")
    if model_type == "cohere":
        fields |= {"use_qk_norm": draw.random() < 0.8, "logit_scale": draw.choice([0.25, 1.0])}
    if model_type in ("persimmon", "phi", "stablelm"):
        fields["qk_layernorm"] = draw.random() < 0.8
    if model_type == "stablelm":
        fields |= maybe("use_qkv_bias", "use_parallel_residual")
    if model_type == "hunyuan_v1_dense" and draw.random() < 0.4:
        fields |= rope("dynamic", alpha=draw.choice([3.0, 1000.0]), factor=1.0)
    if model_type == "granite_swa" and draw.random() < 0.5:
        fields["layer_rope_theta"] = [draw.choice([0.0, 100.0]) for _ in range(count)]
    if model_type == "ministral3":
        length = draw.choice([3, 8])
        beside = {"original_max_position_embeddings": length, "llama_4_scaling_beta": draw.choice([0.1, 0.7])}
        kinds = ("default", {}), ("yarn", {"factor": 4.0}), ("yarn", {"factor": 16.0, "mscale": 1.0})
        kind, more = draw.choice(kinds)
        fields |= rope(kind, **more, **beside)
    return fields


def odd_older(model_type: str, seed: int) -> dict:
    """Like [`odd`], for types with as many key/value heads as query heads."""
    draw = random.Random(f"{model_type} {seed}")
    H, count, D = draw.choice([1, 2, 3, 5, 6, 9]), draw.choice([1, 2, 3, 4]), draw.choice([4, 6, 8, 10, 14, 22])
    maybe = {name: draw.random() < 0.5 for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")}
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": draw.random() < 0.5}
    if model_type == "ctrl":
        sizes = {"n_embd": H * D, "n_layer": count, "n_head": H, "n_positions": 64, "dff": draw.choice([17, 33, 80])}
        return {**common, **sizes}
    sizes = {"hidden_size": H * D, "num_hidden_layers": count, "num_attention_heads": H, "max_position_embeddings": 64}
    if model_type == "gpt_neox_japanese":
        part = draw.choice([2, 4, D])
        turned = rope("default", partial_rotary_factor=min(1.0, (part + 0.5) / D))
        own = {"intermediate_multiple_size": draw.choice([1, 2, 4]), "layer_norm_eps": draw.choice([1e-5, 1e-3])}
        return {**common, **sizes, **turned, **own}
    kinds = ("default", "linear", "yarn", "llama3")
    return {
        **common, **sizes, **maybe, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
        "intermediate_size": draw.choice([17, 33, 80]), "decoder_bias": draw.random() < 0.5,
        "local_attention": draw.choice([4, 7, 10, 80]),
        "layer_types": [draw.choice(["sliding_attention", "full_attention"]) for _ in range(count)],
        "classifier_activation": draw.choice(["gelu", "silu"]), "norm_eps": draw.choice([1e-5, 1e-3]),
        "rope_parameters": {name: scaled(draw, kinds) for name in ("full_attention", "sliding_attention")},
    }  # fmt: skip


def odd_mixture(model_type: str, seed: int) -> dict:
    """Like [`odd`], for mixtures of experts: what the tested configuration of the type has, with other numbers.

    Widths are multiples of 8, which transformers' grouped products need.
    """
    draw = random.Random(f"{model_type} {seed}")
    base = EXPERTS[model_type]
    H, count = draw.choice([1, 2, 3, 4, 6, 10]), draw.choice([1, 2, 3, 4])
    D = draw.choice([8, 16])
    fields = {
        **base,
        "num_attention_heads": H,
        "num_key_value_heads": draw.choice([g for g in range(1, H + 1) if H % g == 0]),
        "num_hidden_layers": count,
        "hidden_size": 8 * draw.choice([3, 5, 8]) if "head_dim" in base else H * D,
        "intermediate_size": draw.choice([16, 40, 72]),
        "tie_word_embeddings": draw.random() < 0.4,
        **({"head_dim": D} if "head_dim" in base else {}),
    }
    if model_type == "dbrx":
        return odd_dbrx(draw, fields)
    if model_type == "phimoe":
        half = fields["hidden_size"] // H // 2
        scale = draw.choice([1.0, 1.3])
        fields |= rope("longrope", short_factor=[1.0 + i / 7 for i in range(half)], long_factor=[3.0] * half,
                       short_mscale=scale, long_mscale=scale, original_max_position_embeddings=10)  # fmt: skip
    groups = draw.choice([1, 2, 3]) if "n_group" in base else 1
    kept = draw.randint(1, groups)
    each = draw.choice([2, 3, 5, 12])
    for name, value in {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), groups * each),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), draw.randint(1, min(4, kept * each))),
        **dict.fromkeys(("n_shared_experts", "num_shared_experts"), draw.choice([1, 2, 3])),
        **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor"), draw.choice([0.5, 1.0, 2.5])),
        "n_group": groups,
        "topk_group": kept,
        "moe_intermediate_size": draw.choice([8, 24, 56]),
        "shared_expert_intermediate_size": draw.choice([8, 40]),
        "shared_intermediate_size": draw.choice([8, 40]),
        "norm_topk_prob": draw.random() < 0.5,
        "route_scale": draw.choice([0.5, 1.0, 2.5]),
        "mup_enabled": draw.random() < 0.5,
        "lm_head_bias": draw.random() < 0.5,
        "num_dense_layers": draw.randint(0, count - 1),
        "moe_num_shared_experts": draw.choice([1, 2]),
        "swiglu_limit": 7.0,
        "router_jitter_noise": draw.choice([0.01, 0.1, 0.4]),
        "decoder_sparse_step": draw.choice([1, 2, 3]),
        "mlp_only_layers": sorted(draw.sample(range(count), draw.randint(0, count - 1))),
        "first_k_dense_replace": draw.randint(0, count - 1),
        "moe_layer_start_index": draw.randint(0, count - 1),
        "sliding_window": draw.choice([2, 5, 40]),
        "layer_types": [draw.choice(["sliding_attention", "full_attention"]) for _ in range(count)],
        "mlp_layer_types": [draw.choice(["dense", "sparse"]) for _ in range(count - 1)] + ["sparse"],
        "layer_rope_theta": [draw.choice([0.0, 100.0]) for _ in range(count)],
        "attention_bias": draw.random() < 0.5,
        "use_qk_norm": draw.random() < 0.5,
    }.items():
        if name in base:
            fields[name] = value
    fields |= {name: ABSENT for name, value in base.items() if value is ABSENT}
    return mixture_of(fields)


def odd_dbrx(draw: random.Random, fields: dict) -> dict:
    """DBRX's spelling of these fields."""
    experts = draw.choice([1, 2, 5, 12])
    return mixture_of({
        **fields,
        "intermediate_size": ABSENT,
        "num_key_value_heads": ABSENT,
        "tie_word_embeddings": False,
        "d_model": fields["hidden_size"],
        "n_heads": fields["num_attention_heads"],
        "n_layers": fields["num_hidden_layers"],
        "attn_config": {"kv_n_heads": fields["num_key_value_heads"], "rope_theta": 1e4,
                        "clip_qkv": draw.choice([0.3, 2.0, 8])},
        "ffn_config": {"ffn_hidden_size": draw.choice([8, 24, 56]), "moe_num_experts": experts,
                       "moe_top_k": draw.randint(1, min(4, experts)),
                       "moe_normalize_expert_weights": draw.choice([None, 1.0])},
    })  # fmt: skip
