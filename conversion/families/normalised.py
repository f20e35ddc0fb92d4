"""Rotary models with norms of queries and keys or of the outputs of sub-layers, capped logits or attention sinks."""

from typing import Any

from mqa_hf.base.errors import ConversionError

from ..operations import HeadNormWeights, SwapHalves
from .base import (
    ATTENTION,
    QKV,
    Family,
    Rule,
    SourceConfig,
    module_rules,
    one_window,
    renamed,
    rope,
    windows,
)
from .llama import LLAMA_RULES, llama_layer, qwen2
from .variants import GLM_RULES, _family, _replaced, glm, granite, one_plus

IN, OUT = "layers.{}.input_layernorm", "layers.{}.attention_output_norm"
MLP_IN, MLP_OUT = "layers.{}.post_attention_layernorm", "layers.{}.mlp_output_norm"


def qwen3(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    fields = {"query_bias": bias, "key_bias": bias, "value_bias": bias, "output_bias": bias}
    return {**qwen2(c), **fields, "qk_norm": "head"}


def olmo2(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    fields = {"qk_norm": "joint", "residual": "output_norm"}
    return llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, **fields)


def olmo3(c: SourceConfig) -> dict[str, Any]:
    return {**olmo2(c), **windows(c)}


def apertus(c: SourceConfig) -> dict[str, Any]:
    c.require("qk_norm", True, "the transformers class normalises queries and keys")
    c.require("post_norm", False, "the transformers class has norms before attention and MLP")
    bias = c.attention_bias
    fields = {"gated_mlp": False, "qk_norm": "head"}
    return llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, **fields)


def rotated(c: SourceConfig) -> list[bool]:
    """The layers of EXAONE that rotate: those with a window, or all if there is none."""
    return [c.sliding_window is None or kind == "sliding_attention" for kind in c.layer_types]


def exaone4(c: SourceConfig) -> dict[str, Any]:
    c.require("reorder_qk_norm", True, "the transformers class has norms of queries, keys and outputs")
    _ = c.sliding_window_pattern  # settled in layer_types
    return llama_layer(
        c,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm="head",
        residual="output_norm",
        rope_layers=rotated(c),
        **windows(c),
    )


def hunyuan(c: SourceConfig) -> dict[str, Any]:
    c.require("use_qk_norm", True, "the transformers class normalises queries and keys")
    c.require("use_rotary_pos_emb", True, "the transformers class rotates queries and keys")
    c.require("norm_type", "rms", "the transformers class has RMS norms")
    c.require("use_cla", False, "the transformers class shares no keys and values among layers")
    fields = rope_with_alpha(c)
    bias = c.attention_bias
    norm = {"qk_norm": "head", "qk_norm_after_rotation": True}
    return llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, **norm, **fields)


def rope_with_alpha(c: SourceConfig) -> dict[str, Any]:
    """Rotary parameters of HunYuan, whose `alpha` is another `rope_theta`."""
    parameters = dict(c.rope_parameters)
    alpha = parameters.pop("alpha", None)
    if parameters.get("rope_type") != "dynamic" or not alpha:
        return rope(c)
    width = c.head_dim or c.hidden_size // c.num_attention_heads
    theta = parameters["rope_theta"] * alpha ** (width / (width - 2))
    return {"position_embedding": "rotary", "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def nanochat(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    return llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        gated_mlp=False,
        norm_affine=False,
        embedding_norm=True,
        qk_norm="head",
        qk_norm_affine=False,
        qk_norm_after_rotation=True,
        logit_softcap=c.final_logit_softcapping,
    )


def gemma2(c: SourceConfig) -> dict[str, Any]:
    c.require("use_bidirectional_attention", False, "the canonical model is causal")
    return {**vaultgemma(c), "residual": "sandwich"}


def vaultgemma(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    return llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        hidden_act=c.hidden_activation,
        embedding_scale=c.hidden_size**0.5,
        attention_scale=c.query_pre_attn_scalar**-0.5,
        attention_softcap=c.attn_logit_softcapping,
        logit_softcap=c.final_logit_softcapping,
        **windows(c),
    )


def gemma3(c: SourceConfig) -> dict[str, Any]:
    c.require("use_bidirectional_attention", False, "the canonical model is causal")
    _ = c.attn_logit_softcapping  # which the class of transformers does not apply
    _ = getattr(c, "sliding_window_pattern", None)  # settled in layer_types
    return {**vaultgemma(c), "residual": "sandwich", "attention_softcap": None, "qk_norm": "head"}


def glm4(c: SourceConfig) -> dict[str, Any]:
    return {**glm(c), "residual": "sandwich"}


def ministral3(c: SourceConfig) -> dict[str, Any]:
    parameters = dict(c.rope_parameters)
    beta, length = parameters.pop("llama_4_scaling_beta", None), parameters.get("original_max_position_embeddings")
    parameters.pop("max_position_embeddings", None)
    if parameters["rope_type"] == "default":
        parameters.pop("original_max_position_embeddings", None)
    return llama_layer(
        c,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        position_embedding="rotary",
        rope_parameters=parameters,
        query_scaling_beta=beta,
        query_scaling_length=length if beta is not None else None,
        **one_window(c),
    )


def hyperclovax(c: SourceConfig) -> dict[str, Any]:
    residual = "sandwich" if c.use_post_norm else "sequential"
    return {**granite(c), "residual": residual, "logit_scale": c.logits_scaling}  # Granite divides by it


def granite_swa(c: SourceConfig) -> dict[str, Any]:
    fields = rope(c)
    thetas: dict[str, set[float]] = {}
    for kind, theta in zip(c.layer_types, c.layer_rope_theta):
        if theta:
            thetas.setdefault(kind, set()).add(theta)
    if any(len(some) > 1 for some in thetas.values()):
        raise ConversionError("layer_rope_theta differs among layers of the same type, which is not supported")
    each = {kind: {**fields["rope_parameters"], "rope_theta": some.pop()} for kind, some in thetas.items()}
    if each:
        alike = len({one["rope_theta"] for one in each.values()}) == 1
        fields["rope_parameters"] = next(iter(each.values())) if alike else each
    rope_layers = [bool(theta) for theta in c.layer_rope_theta]
    return {**granite(c), **fields, **windows(c), "rope_layers": rope_layers, "attention_sinks": True}


def head_norms(
    shared: bool = True, add_one: bool = False, names: tuple[str, str] = ("q_norm", "k_norm")
) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            f"{ATTENTION}{old}.weight",
            (f"{ATTENTION}{new}.weight",),
            HeadNormWeights(new == "k_norm", shared, add_one),
        )
        for old, new in zip(names, ("q_norm", "k_norm"))
    )


def without(rules: tuple[Rule, ...], *targets: str) -> tuple[Rule, ...]:
    return tuple(rule for rule in rules if not any(rule.targets[0] == f"{name}.weight" for name in targets))


# Gemma's names: the norm after attention is called as Llama's norm before the MLP is.
_SANDWICH = (
    ("layers.{}.post_attention_layernorm", OUT),
    ("layers.{}.pre_feedforward_layernorm", MLP_IN),
    ("layers.{}.post_feedforward_layernorm", MLP_OUT),
)
GEMMA2_RULES = _replaced(without(LLAMA_RULES, MLP_IN), *one_plus((IN, IN), ("norm", "norm"), *_SANDWICH))
GEMMA3_RULES = (*GEMMA2_RULES, *head_norms(add_one=True))
VAULTGEMMA_RULES = _replaced(LLAMA_RULES, *one_plus((IN, IN), ("norm", "norm"), _SANDWICH[1]))
_OUTPUT_NORMS = renamed(("layers.{}.post_attention_layernorm", OUT), ("layers.{}.post_feedforward_layernorm", MLP_OUT))
OLMO2_RULES = (*without(LLAMA_RULES, IN, MLP_IN), *_OUTPUT_NORMS, *head_norms(shared=False))
EXAONE4_RULES = (*without(LLAMA_RULES, IN, MLP_IN), *_OUTPUT_NORMS, *head_norms())
APERTUS_RULES = (
    *without(LLAMA_RULES, IN, MLP_IN),
    *renamed(("layers.{}.attention_layernorm", IN), ("layers.{}.feedforward_layernorm", MLP_IN)),
    *(
        Rule(name, (name,))
        for name in (f"layers.{{}}.mlp.act_fn.{part}" for part in ("alpha_p", "alpha_n", "beta", "eps"))
    ),
    *head_norms(),
)
GLM4_RULES = (
    *GLM_RULES,
    *renamed(("layers.{}.post_self_attn_layernorm", OUT), ("layers.{}.post_mlp_layernorm", MLP_OUT)),
)
HYPERCLOVAX_RULES = (*LLAMA_RULES, *renamed(("layers.{}.post_norm1", OUT), ("layers.{}.post_norm2", MLP_OUT)))
NANOCHAT_RULES = _replaced(
    LLAMA_RULES,
    *module_rules(QKV[0], QKV[0], operation=SwapHalves()),
    *module_rules(QKV[1], QKV[1], operation=SwapHalves()),
    *renamed(("layers.{}.mlp.fc1", "layers.{}.mlp.up_proj"), ("layers.{}.mlp.fc2", "layers.{}.mlp.down_proj")),
)
SINKS = Rule(f"{ATTENTION}sinks", (f"{ATTENTION}sinks",))

# Switches in published files that the classes never read: another name for the activation, a second window; sizes of
# features that are off, token ids and a second head_dim; dropouts.
_GEMMA_INERT = frozenset({"cache_implementation", "hidden_act", "sliding_window_size"})
_HUNYUAN_INERT = frozenset(
    {"add_classification_head", "attention_head_dim", "cla_share_factor", "class_num", "dense_list", "im_end_id"}
    | {"im_newline_id", "im_start_id", "mask_init_id", "org_vocab_size", "pad_id", "pool_type", "pretraining_tp"}
    | {"text_end_id", "text_start_id"}
)
_HYPERCLOVAX_INERT = frozenset({"embd_pdrop", "pretraining_tp", "resid_pdrop", "summary_first_dropout"})

FAMILIES: dict[str, Family] = {
    "apertus": _family(apertus, APERTUS_RULES, frozenset({"hidden_dropout", "pretraining_tp"})),
    "exaone4": _family(exaone4, EXAONE4_RULES),
    "gemma2": _family(gemma2, GEMMA2_RULES, _GEMMA_INERT),
    "gemma3_text": _family(gemma3, GEMMA3_RULES, _GEMMA_INERT | {"rope_local_base_freq"}),
    "glm4": _family(glm4, GLM4_RULES),
    "granite_swa": _family(granite_swa, (*LLAMA_RULES, SINKS)),
    "hunyuan_v1_dense": _family(
        hunyuan, (*LLAMA_RULES, *head_norms(names=("query_layernorm", "key_layernorm"))), _HUNYUAN_INERT
    ),
    "hyperclovax": _family(hyperclovax, HYPERCLOVAX_RULES, _HYPERCLOVAX_INERT),
    "ministral3": _family(ministral3, LLAMA_RULES),
    "nanochat": _family(nanochat, NANOCHAT_RULES),
    "olmo2": _family(olmo2, OLMO2_RULES),
    "olmo3": _family(olmo3, OLMO2_RULES),
    "qwen3": _family(qwen3, (*LLAMA_RULES, *head_norms())),
    "vaultgemma": _family(vaultgemma, VAULTGEMMA_RULES, _GEMMA_INERT),
}
