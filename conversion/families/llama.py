"""Llama and the families that only add biases, windows or another norm to its layer."""

from collections.abc import Callable
from typing import Any

from ..operations import DeinterleaveRotary
from .base import (
    ATTENTION,
    QKV,
    Family,
    Rule,
    SourceConfig,
    head_dim,
    module_rules,
    native_same_class,
    one_window,
    renamed,
    rope,
    shared,
    windows,
)


def llama_layer(
    c: SourceConfig, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool, **fields: Any
) -> dict[str, Any]:
    """Llama's layer: RMS norms before attention and MLP, rotary positions, a gated MLP; `fields` override these."""
    return shared(
        c,
        **{
            "intermediate_size": fields.get("intermediate_size") or c.intermediate_size,
            "num_key_value_heads": fields.get("num_key_value_heads") or c.num_key_value_heads,
            "head_dim": head_dim(c),
            "norm_eps": getattr(c, "rms_norm_eps", None),
            "hidden_act": fields.get("hidden_act") or c.hidden_act,
            "query_bias": qkv_bias,
            "key_bias": qkv_bias,
            "value_bias": qkv_bias,
            "output_bias": output_bias,
            "mlp_bias": mlp_bias,
            "attention_dropout": getattr(c, "attention_dropout", None) or 0.0,
            **({} if "rope_parameters" in fields else rope(c)),
            **fields,
        },
    )


def llama(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=c.attention_bias, output_bias=c.attention_bias, mlp_bias=c.mlp_bias)


def mistral(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=False, **one_window(c))


def ministral(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=False, **windows(c))


def qwen2(c: SourceConfig) -> dict[str, Any]:
    _ = c.use_sliding_window, c.max_window_layers  # both are included in layer_types
    return llama_layer(c, qkv_bias=True, output_bias=False, mlp_bias=False, **windows(c))


def iquestcoder(c: SourceConfig) -> dict[str, Any]:
    c.require("clip_qkv", None, "the transformers class does not support it")
    return llama(c)


def cwm(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=c.mlp_bias, **windows(c))


def seed_oss(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(
        c,
        qkv_bias=c.attention_bias,
        output_bias=c.attention_out_bias,
        mlp_bias=c.mlp_bias,
        hidden_dropout=c.residual_dropout,
    )


def smollm3(c: SourceConfig) -> dict[str, Any]:
    _ = c.no_rope_layer_interval, c.use_sliding_window  # included in no_rope_layers and layer_types
    return {**llama(c), **windows(c), "rope_layers": [bool(rotary) for rotary in c.no_rope_layers]}


def arcee(c: SourceConfig) -> dict[str, Any]:
    return {**llama(c), "gated_mlp": False}


def jais2(c: SourceConfig) -> dict[str, Any]:
    return {**llama(c), "gated_mlp": False, "norm_type": "layer_norm", "norm_eps": c.layer_norm_eps}


def ernie4_5(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=c.use_bias, output_bias=c.use_bias, mlp_bias=c.use_bias)


def helium(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=c.attention_bias, output_bias=False, mlp_bias=c.mlp_bias)


_LLAMA_MODULES = (
    "embed_tokens",
    "layers.{}.input_layernorm",
    "layers.{}.post_attention_layernorm",
    *(f"{ATTENTION}{name}_proj" for name in "qkvo"),
    *(f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "norm",
    "lm_head",
)
LLAMA_RULES = renamed(*((name, name) for name in _LLAMA_MODULES))

INTERLEAVED_LLAMA_RULES = (
    *(rule for rule in LLAMA_RULES if ".q_proj." not in rule.source and ".k_proj." not in rule.source),
    *module_rules(QKV[0], QKV[0], operation=DeinterleaveRotary()),
    *module_rules(QKV[1], QKV[1], operation=DeinterleaveRotary()),
)


def _llama_family(
    config: Callable,
    rules: tuple[Rule, ...] = LLAMA_RULES,
    inert: frozenset[str] = frozenset(),
    prefixes: tuple[str, ...] = ("model.",),
) -> Family:
    return Family(
        prefixes=prefixes,
        config=config,
        rules=rules,
        ignored=("layers.{}.self_attn.rotary_emb.inv_freq",),
        # SmolLM2 and Falcon 3 have the last three in their files; the class reads none of them.
        inert=inert | {"pretraining_tp", "is_llama_config", "rope_interleaved", "activation"},
        native=native_same_class,
    )


# The names in LG's files; the transformers class is Llama's.
EXAONE_RULES = (
    *LLAMA_RULES,
    *renamed(
        ("wte", "embed_tokens"),
        ("h.{}.ln_1", "layers.{}.input_layernorm"),
        ("h.{}.ln_2", "layers.{}.post_attention_layernorm"),
        *((f"h.{{}}.attn.attention.{name}_proj", f"{ATTENTION}{name}_proj") for name in "qkv"),
        ("h.{}.attn.attention.out_proj", f"{ATTENTION}o_proj"),
        ("h.{}.mlp.c_fc_0", "layers.{}.mlp.gate_proj"),
        ("h.{}.mlp.c_fc_1", "layers.{}.mlp.up_proj"),
        ("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj"),
        ("ln_f", "norm"),
    ),
)

FAMILIES = {
    "arcee": _llama_family(arcee),
    "cwm": _llama_family(cwm),
    "ernie4_5": _llama_family(ernie4_5, INTERLEAVED_LLAMA_RULES),
    "exaone": _llama_family(llama, EXAONE_RULES, frozenset({"embed_dropout"}), ("model.", "transformer.")),
    "helium": _llama_family(helium, INTERLEAVED_LLAMA_RULES),
    "internlm3": _llama_family(llama),
    "iquestcoder": _llama_family(iquestcoder, inert=frozenset({"max_window_layers"})),
    "jais2": _llama_family(jais2),
    "llama": _llama_family(llama),
    "ministral": _llama_family(ministral),
    "mistral": _llama_family(mistral),
    "qwen2": _llama_family(qwen2, inert=frozenset({"use_mrope"})),
    "seed_oss": _llama_family(seed_oss),
    "smollm3": _llama_family(smollm3, inert=frozenset({"max_window_layers"})),
}
