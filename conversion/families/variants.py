"""Rotary models that differ from Llama in norms, fused projections or the MLP (parallel or not gated)."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from mqa_hf.configuration_mqa import MQAConfig

from ..operations import AddOne, HeadNormWeights, SplitGateUp, SplitGrouped, SplitStacked
from .base import (
    ATTENTION,
    QKV,
    Family,
    Rule,
    SourceConfig,
    Stacked,
    head_layer_norms,
    module_rules,
    native_same_class,
    one_window,
    refuse,
    renamed,
    rope,
    windows,
)
from .llama import INTERLEAVED_LLAMA_RULES, LLAMA_RULES, llama_layer


def stablelm(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(
        c,
        qk_norm="head" if c.qk_layernorm else None,
        qkv_bias=c.use_qkv_bias,
        output_bias=False,
        mlp_bias=False,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        residual="parallel_shared_norm" if c.use_parallel_residual else "sequential",
        hidden_dropout=c.hidden_dropout,
        **rope(c, partial=True),
    )


def native_stablelm(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    refuse("StableLM's class", {"the norms of queries and keys are a tensor for each head": source.qk_layernorm})
    return native_same_class(source, config)


def persimmon(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(
        c,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm="head" if c.qk_layernorm else None,
        qk_norm_bias=bool(c.qk_layernorm),
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        gated_mlp=False,
        hidden_dropout=c.hidden_dropout,
        **rope(c, partial=True),
    )


def olmo(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    fields = {"norm_type": "layer_norm", "norm_eps": 1e-5, "norm_affine": False, "clip_qkv": c.clip_qkv}
    return llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, **fields)


def gemma(c: SourceConfig) -> dict[str, Any]:
    c.require("use_bidirectional_attention", False, "the canonical model is causal")
    bias = c.attention_bias
    return llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, embedding_scale=c.hidden_size**0.5)


def phi3(c: SourceConfig) -> dict[str, Any]:
    _ = c.original_max_position_embeddings  # included in rope_parameters
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        c.require(name, False, "the transformers class has no such bias")
    for name in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini has these
        c.require(name, 1, "the transformers class does not support it")
    return llama_layer(
        c,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        hidden_dropout=c.resid_pdrop,
        rope_recompute=c.rope_parameters["rope_type"] == "longrope",
        **one_window(c),
        **rope(c, partial=True),
    )


def cohere(c: SourceConfig) -> dict[str, Any]:
    c.require("use_gated_activation", True, "the transformers class has gated MLPs")
    c.require("use_parallel_block", True, "the transformers class has parallel residuals")
    c.require("rotary_pct", 1.0, "the transformers class rotates whole heads")
    bias = c.attention_bias
    return llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        norm_bias=False,
        qk_norm="head" if getattr(c, "use_qk_norm", False) else None,
        residual="parallel_shared_norm",
        logit_scale=c.logit_scale,
    )


def cohere2(c: SourceConfig) -> dict[str, Any]:
    _ = getattr(c, "sliding_window_pattern", None)  # included in layer_types
    rotated = [kind == "sliding_attention" for kind in c.layer_types]
    return {**cohere(c), **windows(c), "rope_layers": rotated}


def glm(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(c, qkv_bias=c.attention_bias, output_bias=False, mlp_bias=False, **rope(c, partial=True))


def starcoder2(c: SourceConfig) -> dict[str, Any]:
    c.require("mlp_type", "default", "the transformers class has a plain MLP")
    c.require("norm_type", "layer_norm", "the transformers class has layer norms")
    bias = c.use_bias
    return llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_type="layer_norm",
        norm_eps=c.norm_epsilon,
        gated_mlp=False,
        hidden_dropout=c.residual_dropout,
        embedding_dropout=c.embedding_dropout,
        **one_window(c),
    )


def nemotron(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    return llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=c.mlp_bias,
        norm_type="layer_norm",
        norm_eps=c.norm_eps,
        gated_mlp=False,
        **rope(c, partial=True),
    )


def granite(c: SourceConfig) -> dict[str, Any]:
    return llama_layer(
        c,
        qkv_bias=c.attention_bias,
        output_bias=c.attention_bias,
        mlp_bias=getattr(c, "mlp_bias", False),
        attention_scale=c.attention_multiplier,
        embedding_scale=c.embedding_multiplier,
        scale_inputs_embeds=True,
        residual_multiplier=c.residual_multiplier,
        logit_scale=1 / c.logits_scaling,
    )


def modernbert_decoder(c: SourceConfig) -> dict[str, Any]:
    _ = c.local_attention  # included in sliding_window
    bias = c.attention_bias
    return llama_layer(
        c,
        num_key_value_heads=c.num_attention_heads,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=c.mlp_bias,
        norm_type="layer_norm",
        norm_eps=c.norm_eps,
        norm_bias=c.norm_bias,
        hidden_act=c.hidden_activation,
        embedding_norm=True,
        first_norm=False,
        head_transform=c.classifier_activation,
        head_transform_bias=c.classifier_bias,
        lm_head_bias=c.decoder_bias,
        embedding_dropout=c.embedding_dropout,
        activation_dropout=c.mlp_dropout,
        **windows(c),
    )


def _replaced(rules: tuple[Rule, ...], *new: Rule) -> tuple[Rule, ...]:
    """Replace the rules that have the same targets as the new ones."""
    targets = {target for rule in new for target in rule.targets}
    return (*(rule for rule in rules if not targets & set(rule.targets)), *new)


def one_plus(*names: tuple[str, str]) -> tuple[Rule, ...]:
    """The rules of norms whose gain is 1 + weight, as pairs of the source's name and ours."""
    return tuple(Rule(f"{source}.weight", (f"{target}.weight",), AddOne()) for source, target in names)


_NORMS = ("layers.{}.input_layernorm", "layers.{}.post_attention_layernorm", "norm")
_GATE_UP = module_rules(
    "layers.{}.mlp.gate_up_proj", "layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", operation=SplitGateUp()
)

GEMMA_RULES = _replaced(LLAMA_RULES, *one_plus(*((name, name) for name in _NORMS)))
NEMOTRON_RULES = GEMMA_RULES
PHI3_RULES = _replaced(LLAMA_RULES, *_GATE_UP, *module_rules(f"{ATTENTION}qkv_proj", *QKV, operation=SplitStacked()))
GLM_RULES = _replaced(INTERLEAVED_LLAMA_RULES, *_GATE_UP)
COHERE_RULES = (
    *INTERLEAVED_LLAMA_RULES,
    *(
        Rule(
            f"{ATTENTION}{name}_norm.weight",
            (f"{ATTENTION}{name}_norm.weight",),
            HeadNormWeights(name == "k", shared=False, interleaved=True),
        )
        for name in "qk"
    ),
)
PERSIMMON_RULES = _replaced(
    LLAMA_RULES,
    *head_layer_norms(),
    *module_rules(f"{ATTENTION}query_key_value", *QKV, operation=SplitGrouped()),
    *renamed(
        (f"{ATTENTION}dense", f"{ATTENTION}o_proj"),
        ("layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
        ("layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
        ("final_layernorm", "norm"),
    ),
)
MODERNBERT_RULES = (
    *renamed(
        ("embeddings.tok_embeddings", "embed_tokens"),
        ("embeddings.norm", "embed_norm"),
        ("layers.{}.attn_norm", "layers.{}.input_layernorm"),
        *((f"layers.{{}}.attn.{name}_proj", f"{ATTENTION}{name}_proj") for name in "qkv"),
        ("layers.{}.attn.Wo", f"{ATTENTION}o_proj"),
        ("layers.{}.mlp_norm", "layers.{}.post_attention_layernorm"),
        ("layers.{}.mlp.Wo", "layers.{}.mlp.down_proj"),
        ("final_norm", "norm"),
        ("lm_head.dense", "head_transform.dense"),
        ("lm_head.norm", "head_transform.norm"),
        ("decoder", "lm_head"),
    ),
    *module_rules("layers.{}.mlp.Wi", "layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj", operation=SplitGateUp()),
)
_HEAD_NORMS = tuple(f"{ATTENTION}{name}_layernorm.norms" for name in "qk")
_STACKED_NORMS = tuple(Stacked(name, {"weight": ("weight",)}) for name in _HEAD_NORMS)
STABLELM_RULES = (
    *LLAMA_RULES,
    *(
        Rule(f"{source}.weight", (f"{ATTENTION}{name}_norm.weight",), HeadNormWeights(name == "k", shared=False))
        for name, source in zip("qk", _HEAD_NORMS)
    ),
)
STARCODER2_RULES = _replaced(
    LLAMA_RULES,
    *renamed(("layers.{}.mlp.c_fc", "layers.{}.mlp.up_proj"), ("layers.{}.mlp.c_proj", "layers.{}.mlp.down_proj")),
)


def _family(config: Callable, rules: tuple[Rule, ...], inert: frozenset[str] = frozenset(), **fields: Any) -> Family:
    return Family(
        **{
            "prefixes": ("model.",),
            "config": config,
            "rules": rules,
            "ignored": ("layers.{}.self_attn.rotary_emb.inv_freq",),
            "inert": inert,
            "native": native_same_class,
            **fields,
        }
    )


FAMILIES = {
    "cohere": _family(cohere, COHERE_RULES, frozenset({"model_max_length", "pretraining_tp"})),
    "cohere2": _family(
        cohere2,
        INTERLEAVED_LLAMA_RULES,
        frozenset({"cache_implementation", "layer_switch", "order_of_interleaved_layers", "position_embedding_type"})
        | {"use_embedding_sharing", "use_parallel_embedding"},
    ),
    "gemma": _family(gemma, GEMMA_RULES, frozenset({"hidden_activation"})),
    "glm": _family(glm, GLM_RULES),
    "granite": _family(granite, LLAMA_RULES),
    "modernbert-decoder": _family(
        modernbert_decoder,
        MODERNBERT_RULES,
        # Of initialisation, of training and of classifiers; ModernBERT's other names of positions, windows and norms.
        frozenset({"initializer_cutoff_factor", "classifier_dropout", "classifier_pooling", "is_causal"})
        | {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "layer_norm_eps"}
        | {"deterministic_flash_attn", "position_embedding_type", "reference_compile", "repad_logits_with_grad"}
        | {"sparse_pred_ignore_index", "sparse_prediction"},
        native=None,
    ),
    "nemotron": _family(nemotron, NEMOTRON_RULES),
    "olmo": _family(olmo, LLAMA_RULES, frozenset({"pretraining_tp"})),
    "persimmon": _family(persimmon, PERSIMMON_RULES, native=None),
    # The class never reads "embd_pdrop".
    "phi3": _family(phi3, PHI3_RULES, frozenset({"embd_pdrop"})),
    "stablelm": _family(stablelm, STABLELM_RULES, stacked=_STACKED_NORMS, native=native_stablelm),
    # Older names from GPT-BigCode, which the class never reads.
    "starcoder2": _family(
        starcoder2,
        STARCODER2_RULES,
        frozenset({"attention_softmax_in_fp32", "layer_norm_epsilon", "scale_attention_softmax_in_fp32"})
        | {"scale_attn_weights", "activation_function"},
    ),
}
