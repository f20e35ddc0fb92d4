"""GPT-NeoX, GPT-J, CodeGen and Phi: layer norms, plain MLPs, biases; rotary positions."""

from typing import Any

from transformers import PhiConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig

from ..operations import (
    DeinterleaveRotary,
    SplitCodeGen,
    SplitGrouped,
)
from .base import (
    ATTENTION,
    QKV,
    Family,
    Rule,
    SourceConfig,
    common_fields,
    head_layer_norms,
    module_rules,
    native_same_class,
    partial_factor,
    renamed,
    rope,
    shared,
)
from .gpt import GPT_MASKS, SUMMARY


def gpt_neox(c: SourceConfig) -> dict[str, Any]:
    return shared(
        c,
        intermediate_size=c.intermediate_size,
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        residual="parallel" if c.use_parallel_residual else "sequential",
        hidden_act=c.hidden_act,
        gated_mlp=False,
        query_bias=c.attention_bias,
        key_bias=c.attention_bias,
        value_bias=c.attention_bias,
        output_bias=c.attention_bias,
        mlp_bias=True,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.hidden_dropout,
        embedding_dropout=c.hidden_dropout,
        **rope(c, partial=True),
    )


def gpt_neox_japanese(c: SourceConfig) -> dict[str, Any]:
    layers = c.num_hidden_layers
    return shared(
        c,
        intermediate_size=int(c.hidden_size * c.intermediate_multiple_size),
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        hidden_act=c.hidden_act,
        gated_mlp=False,
        output_bias=[i == layers - 1 for i in range(layers)],
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.hidden_dropout,
        **rope(c, partial=True),
    )


def gptj(c: SourceConfig) -> dict[str, Any]:
    head_dim = c.hidden_size // c.num_attention_heads
    if not c.rotary_dim or c.rotary_dim > head_dim or c.rotary_dim % 2:
        raise ConversionError(f"rotary_dim={c.rotary_dim!r} must be an even number of at most {head_dim}")
    return shared(
        c,
        intermediate_size=c.n_inner or 4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        residual="parallel_shared_norm",
        hidden_act=c.activation_function,
        gated_mlp=False,
        mlp_bias=True,
        lm_head_bias=True,
        attention_dropout=c.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        position_embedding="rotary",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": partial_factor(c.rotary_dim, head_dim),
        },
    )


def codegen(c: SourceConfig) -> dict[str, Any]:
    if c.num_attention_heads % 4:
        raise ConversionError(f"codegen: n_head={c.num_attention_heads} must be a multiple of 4")
    return gptj(c)


def phi(c: SourceConfig) -> dict[str, Any]:
    return shared(
        c,
        intermediate_size=c.intermediate_size,
        num_key_value_heads=c.num_key_value_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        qk_norm="head" if c.qk_layernorm else None,
        qk_norm_bias=bool(c.qk_layernorm),
        residual="parallel_shared_norm",
        hidden_act=c.hidden_act,
        gated_mlp=False,
        query_bias=True,
        key_bias=True,
        value_bias=True,
        output_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
        attention_dropout=c.attention_dropout or 0.0,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        **rope(c, partial=True),
    )


def native_phi(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """GPT-J's layer is Phi's once its rotary rows are in half-split order."""
    return PhiConfig(
        **common_fields(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.norm_eps,
        rope_parameters=config.rope_parameters,
        attention_dropout=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.embedding_dropout,
    )


GPT_NEOX_RULES = (
    *renamed(
        ("embed_in", "embed_tokens"),
        ("layers.{}.input_layernorm", "layers.{}.input_layernorm"),
        ("layers.{}.post_attention_layernorm", "layers.{}.post_attention_layernorm"),
        ("layers.{}.attention.dense", f"{ATTENTION}o_proj"),
        ("layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
        ("layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
        ("final_layer_norm", "norm"),
        ("embed_out", "lm_head"),  # its name before transformers 5
        ("lm_head", "lm_head"),
    ),
    *module_rules("layers.{}.attention.query_key_value", *QKV, operation=SplitGrouped()),
)

NEOX_JAPANESE_RULES = (*GPT_NEOX_RULES, Rule("layers.{}.attention.dense_bias", (f"{ATTENTION}o_proj.bias",)))

NEOX_UNUSED = tuple(f"layers.{{}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))

# GPT-J's layer without its queries, keys and values
_GPTJ_RULES = renamed(
    ("wte", "embed_tokens"),
    ("h.{}.ln_1", "layers.{}.input_layernorm"),
    ("h.{}.attn.out_proj", f"{ATTENTION}o_proj"),
    ("h.{}.mlp.fc_in", "layers.{}.mlp.up_proj"),
    ("h.{}.mlp.fc_out", "layers.{}.mlp.down_proj"),
    ("ln_f", "norm"),
    ("lm_head", "lm_head"),
)

GPTJ_RULES = (
    *_GPTJ_RULES,
    *module_rules("h.{}.attn.q_proj", QKV[0], operation=DeinterleaveRotary()),
    *module_rules("h.{}.attn.k_proj", QKV[1], operation=DeinterleaveRotary()),
    *renamed(("h.{}.attn.v_proj", QKV[2])),
)

CODEGEN_RULES = (*_GPTJ_RULES, *module_rules("h.{}.attn.qkv_proj", *QKV, operation=SplitCodeGen()))

PHI_RULES = (
    *head_layer_norms(),
    *renamed(
        ("embed_tokens", "embed_tokens"),
        ("layers.{}.input_layernorm", "layers.{}.input_layernorm"),
        *((name, name) for name in QKV),
        (f"{ATTENTION}dense", f"{ATTENTION}o_proj"),
        ("layers.{}.mlp.fc1", "layers.{}.mlp.up_proj"),
        ("layers.{}.mlp.fc2", "layers.{}.mlp.down_proj"),
        ("final_layernorm", "norm"),
        ("lm_head", "lm_head"),
    ),
)

FAMILIES = {
    "codegen": Family(
        prefixes=("transformer.",),
        config=codegen,
        rules=CODEGEN_RULES,
        ignored=("h.{}.attn.causal_mask",),
        # "n_ctx" is read without effect; published files have the others, which the class never reads.
        inert=SUMMARY | {"n_ctx", "rotary", "scale_attn_weights"},
        native=native_phi,
    ),
    "gpt_neox": Family(
        prefixes=("gpt_neox.",),
        config=gpt_neox,
        rules=GPT_NEOX_RULES,
        ignored=NEOX_UNUSED,
        # rotary_* are included in rope_parameters; the class does not read the *_prob names.
        inert=frozenset(
            {
                "attention_probs_dropout_prob",
                "classifier_dropout",
                "hidden_dropout_prob",
                "rotary_emb_base",
                "rotary_pct",
            }
        ),
    ),
    "gpt_neox_japanese": Family(
        prefixes=("gpt_neox_japanese.",),
        config=gpt_neox_japanese,
        rules=NEOX_JAPANESE_RULES,
        ignored=NEOX_UNUSED,
        inert=frozenset({"rotary_emb_base", "rotary_pct"}),
    ),
    "gptj": Family(
        prefixes=("transformer.",),
        config=gptj,
        rules=GPTJ_RULES,
        ignored=(*GPT_MASKS, "h.{}.attn.embed_positions"),
        # Published files have "rotary" and "scale_attn_weights", which the class never reads.
        inert=SUMMARY | {"rotary", "scale_attn_weights"},
        native=native_phi,
    ),
    "phi": Family(
        prefixes=("model.",),
        config=phi,
        rules=PHI_RULES,
        ignored=("layers.{}.self_attn.rotary_emb.inv_freq",),
        native=native_same_class,
    ),
}
