"""GPT-2 and its contemporaries: layer norms, plain MLPs, biases; learned, sinusoidal or rotary positions."""

from typing import Any

from transformers import GPTBigCodeConfig, PhiConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig

from ..operations import (
    Copy,
    DeinterleaveRotary,
    DropRows,
    Operation,
    SplitCodeGen,
    SplitGrouped,
    SplitStacked,
    Transpose,
)
from .base import (
    ATTENTION,
    BIASED_LAYER,
    COPY,
    QKV,
    Family,
    Rule,
    SourceConfig,
    common_fields,
    module_rules,
    native_same_class,
    partial_factor,
    refuse,
    renamed,
    rope,
    shared,
)


def _gpt(c: SourceConfig, key_value_heads: int) -> dict[str, Any]:
    """GPT-2's layer: layer norms before attention and MLP, learned positions, biases everywhere."""
    c.require("add_cross_attention", False, "it is the decoder of an encoder-decoder model")
    head_dim = c.hidden_size // c.num_attention_heads
    return shared(
        c,
        intermediate_size=c.n_inner or 4 * c.hidden_size,
        num_key_value_heads=key_value_heads,
        attention_scale=head_dim**-0.5 if c.scale_attn_weights else 1.0,
        position_embedding="learned",
        norm_eps=c.layer_norm_epsilon,
        hidden_act=c.activation_function,
        attention_dropout=c.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        **BIASED_LAYER,
    )


def gpt2(c: SourceConfig) -> dict[str, Any]:
    _ = c.scale_attn_by_inverse_layer_idx  # folded into the queries, see gpt2_scales
    return _gpt(c, c.num_attention_heads)


def gpt_bigcode(c: SourceConfig) -> dict[str, Any]:
    return _gpt(c, 1 if c.multi_query else c.num_attention_heads)


def gpt2_scales(config: PreTrainedConfig, layer: int) -> dict[str, float]:
    return {"q_proj": 1.0 / (layer + 1)} if config.scale_attn_by_inverse_layer_idx else {}


def openai_gpt(c: SourceConfig) -> dict[str, Any]:
    return shared(
        c,
        intermediate_size=4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        position_embedding="learned",
        norm_eps=c.layer_norm_epsilon,
        final_norm=False,
        residual="post_norm",
        hidden_act={"gelu": "gelu_new", "swish": "silu"}.get(c.afn, c.afn),
        attention_dropout=c.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        **BIASED_LAYER,
    )


def opt(c: SourceConfig) -> dict[str, Any]:
    _ = c.layerdrop  # skips whole layers while training only
    c.require("learned_embeddings", True, "the class of transformers has learned positions")
    c.require("scale_embeddings", False, "the class of transformers does not scale embeddings")
    pre_norm, no_final_norm = c.do_layer_norm_before, c._remove_final_layer_norm
    return shared(
        c,
        embedding_size=c.word_embed_proj_dim,
        intermediate_size=c.ffn_dim,
        num_key_value_heads=c.num_attention_heads,
        position_embedding="learned",
        positions_from_mask=True,
        norm_type="layer_norm",
        norm_eps=1e-5,
        norm_affine=c.layer_norm_elementwise_affine,
        final_norm=pre_norm and not no_final_norm,
        residual="sequential" if pre_norm else "post_norm",
        hidden_act=c.activation_function,
        gated_mlp=False,
        query_bias=c.enable_bias,
        value_bias=c.enable_bias,
        output_bias=c.enable_bias,
        mlp_bias=c.enable_bias,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.dropout,
        initializer_range=c.init_std,
    )


def gpt_neo(c: SourceConfig) -> dict[str, Any]:
    _ = c.attention_types  # settled in attention_layers
    window, kinds = c.window_size, {"global": "full_attention", "local": "sliding_attention"}
    layer_types = [kinds[kind] for kind in c.attention_layers]
    return shared(
        c,
        intermediate_size=c.intermediate_size or 4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        attention_scale=1.0,
        position_embedding="learned",
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        hidden_act=c.activation_function,
        gated_mlp=False,
        output_bias=True,
        mlp_bias=True,
        layer_types=layer_types,
        sliding_window=window if "sliding_attention" in layer_types else None,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.resid_dropout,
        embedding_dropout=c.embed_dropout,
    )


def _fairseq(c: SourceConfig, **fields: Any) -> dict[str, Any]:
    """The decoder of fairseq's GPT: a pre-norm layer with biases, embeddings scaled by the root of their width."""
    scale = c.hidden_size**0.5 if c.scale_embedding else 1.0
    _ = c.layerdrop  # skips whole layers while training only
    return shared(
        c,
        **{
            "num_key_value_heads": c.num_attention_heads,
            "embedding_scale": scale,
            "norm_eps": 1e-5,
            **BIASED_LAYER,
            "activation_dropout": c.activation_dropout,
            **fields,
        },
    )


def xglm(c: SourceConfig) -> dict[str, Any]:
    c.require("add_cross_attention", False, "it is the decoder of an encoder-decoder model")
    if c.hidden_size % 2:
        raise ConversionError(f"xglm: d_model={c.hidden_size} must be even for sinusoidal positions")
    if (c.pad_token_id or 0) >= 2:
        # The class zeroes the row of this number in its table of positions, of which the first two are never used.
        raise ConversionError(
            f"xglm: with pad_token_id={c.pad_token_id} position {c.pad_token_id - 2} has no sinusoid"
        )
    return _fairseq(
        c,
        intermediate_size=c.ffn_dim,
        position_embedding="sinusoidal",
        position_offset=2,
        sinusoidal_endpoint=True,
        hidden_act=c.activation_function,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.dropout,
        embedding_dropout=c.dropout,
        initializer_range=c.init_std,
    )


def biogpt(c: SourceConfig) -> dict[str, Any]:
    return _fairseq(
        c,
        intermediate_size=c.intermediate_size,
        position_embedding="learned",
        hidden_act=c.hidden_act,
        attention_dropout=c.attention_probs_dropout_prob,
        hidden_dropout=c.hidden_dropout_prob,
        embedding_dropout=c.hidden_dropout_prob,
    )


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
    c.require("qk_layernorm", False, "a norm across each query and key head does not commute with pooling")
    return shared(
        c,
        intermediate_size=c.intermediate_size,
        num_key_value_heads=c.num_key_value_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
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


def native_bigcode(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """GPT-BigCode is GPT-2 with one shared key/value head; a pre-norm OPT fits too."""
    reasons = {
        f"{config.num_key_value_heads} key/value heads (it has 1)": config.num_key_value_heads != 1,
        "norms after each sub-layer (do_layer_norm_before=False)": config.residual != "sequential",
        "no final norm": not config.final_norm,
        "norms without weights": not config.norm_affine,
        "sliding windows (attention_types)": "sliding_attention" in config.layer_types,
        "projected embeddings (word_embed_proj_dim)": config.embedding_size != config.hidden_size,
    }
    refuse("gpt_bigcode", reasons)
    return GPTBigCodeConfig(
        **common_fields(config),
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.norm_eps,
        scale_attn_weights=config.attention_scale != 1.0,
        multi_query=True,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.embedding_dropout,
    )


def native_phi(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """GPT-J's layer is Phi's, once the rotary rows are in the half-split order."""
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


_GPT_NAMES = (
    ("wte", "embed_tokens"),
    ("wpe", "embed_positions"),
    ("h.{}.ln_1", "layers.{}.input_layernorm"),
    ("h.{}.ln_2", "layers.{}.post_attention_layernorm"),
    ("ln_f", "norm"),
    ("lm_head", "lm_head"),
)


def _gpt_rules(linear: Operation, fused: Operation, fused_bias: Operation) -> tuple[Rule, ...]:
    # Without rotary positions softmax does not see a constant added to every key: its bias is dropped.
    return (
        *renamed(*_GPT_NAMES),
        Rule("h.{}.attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV), fused),
        Rule("h.{}.attn.c_attn.bias", (f"{QKV[0]}.bias", None, f"{QKV[2]}.bias"), fused_bias),
        *module_rules("h.{}.attn.c_proj", f"{ATTENTION}o_proj", operation=linear, bias=COPY),
        *module_rules("h.{}.mlp.c_fc", "layers.{}.mlp.up_proj", operation=linear, bias=COPY),
        *module_rules("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj", operation=linear, bias=COPY),
    )


# OPT, XGLM and BioGPT, whose final norm and head have names of their own.
_FAIRSEQ_RULES = (
    Rule("embed_positions.weight", ("embed_positions.weight",), DropRows(2)),
    *renamed(
        ("embed_tokens", "embed_tokens"),
        (QKV[0], QKV[0]),
        (QKV[2], QKV[2]),
        (f"{ATTENTION}out_proj", f"{ATTENTION}o_proj"),
        ("layers.{}.self_attn_layer_norm", "layers.{}.input_layernorm"),
        ("layers.{}.final_layer_norm", "layers.{}.post_attention_layernorm"),
        ("layers.{}.fc1", "layers.{}.mlp.up_proj"),
        ("layers.{}.fc2", "layers.{}.mlp.down_proj"),
    ),
    Rule(f"{QKV[1]}.weight", (f"{QKV[1]}.weight",)),
    Rule(f"{QKV[1]}.bias", (None,)),
)

OPT_RULES = (
    *_FAIRSEQ_RULES,
    *renamed(
        ("project_in", "project_in"),
        ("project_out", "project_out"),
        ("final_layer_norm", "norm"),
        ("lm_head", "lm_head"),
    ),
)

XGLM_RULES = (*_FAIRSEQ_RULES, *renamed(("layer_norm", "norm"), ("lm_head", "lm_head")))

BIOGPT_RULES = (*_FAIRSEQ_RULES, *renamed(("layer_norm", "norm"), ("output_projection", "lm_head")))

GPT_NEO_RULES = renamed(
    *_GPT_NAMES,
    *((f"h.{{}}.attn.attention.{name}_proj", f"{ATTENTION}{name}_proj") for name in "qkv"),
    ("h.{}.attn.attention.out_proj", f"{ATTENTION}o_proj"),
    ("h.{}.mlp.c_fc", "layers.{}.mlp.up_proj"),
    ("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj"),
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

# GPT-J's layer but for its queries, keys and values
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

PHI_RULES = renamed(
    ("embed_tokens", "embed_tokens"),
    ("layers.{}.input_layernorm", "layers.{}.input_layernorm"),
    *((name, name) for name in QKV),
    (f"{ATTENTION}dense", f"{ATTENTION}o_proj"),
    ("layers.{}.mlp.fc1", "layers.{}.mlp.up_proj"),
    ("layers.{}.mlp.fc2", "layers.{}.mlp.down_proj"),
    ("final_layernorm", "norm"),
    ("lm_head", "lm_head"),
)


_SUMMARY = frozenset(
    f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
)
_GPT_MASKS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")

FAMILIES = {
    "biogpt": Family(
        prefixes=("biogpt.",),
        config=biogpt,
        rules=BIOGPT_RULES,
        inert=frozenset({"layer_norm_eps"}),  # the class's norms have the default
    ),
    "codegen": Family(
        prefixes=("transformer.",),
        config=codegen,
        rules=CODEGEN_RULES,
        ignored=("h.{}.attn.causal_mask",),
        # "n_ctx" is read without effect, the others stand in published files and the class never reads them.
        inert=_SUMMARY | {"n_ctx", "rotary", "scale_attn_weights"},
        native=native_phi,
    ),
    "gpt2": Family(
        prefixes=("transformer.",),
        config=gpt2,
        rules=_gpt_rules(Transpose(), SplitStacked(transposed=True), SplitStacked()),
        ignored=_GPT_MASKS,
        inert=_SUMMARY | {"reorder_and_upcast_attn", "n_ctx", "n_special", "predict_special_tokens", "output_past"},
        scales=gpt2_scales,
        native=native_bigcode,
    ),
    "gpt_bigcode": Family(
        prefixes=("transformer.",),
        config=gpt_bigcode,
        rules=_gpt_rules(Copy(), SplitGrouped(), SplitGrouped()),
        ignored=_GPT_MASKS,
        # The last two lines stand in the files of SantaCoder and StarCoder; the class reads none of them.
        inert=_SUMMARY
        | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads", "n_ctx"}
        | {"inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"}
        | {"validate_runner_input"},
        native=native_bigcode,
    ),
    "gpt_neo": Family(
        prefixes=("transformer.",),
        config=gpt_neo,
        rules=GPT_NEO_RULES,
        ignored=("h.{}.attn.attention.bias", "h.{}.attn.attention.masked_bias"),
        inert=_SUMMARY | {"classifier_dropout"},
        native=native_bigcode,
    ),
    "gpt_neox": Family(
        prefixes=("gpt_neox.",),
        config=gpt_neox,
        rules=GPT_NEOX_RULES,
        ignored=(
            "layers.{}.attention.bias",
            "layers.{}.attention.masked_bias",
            "layers.{}.attention.rotary_emb.inv_freq",
        ),
        # rotary_* are in rope_parameters; the *_prob are names that the class does not read.
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
    "gptj": Family(
        prefixes=("transformer.",),
        config=gptj,
        rules=GPTJ_RULES,
        ignored=(*_GPT_MASKS, "h.{}.attn.embed_positions"),
        # "rotary" and "scale_attn_weights" stand in published files, and the class never reads them.
        inert=_SUMMARY | {"rotary", "scale_attn_weights"},
        native=native_phi,
    ),
    "openai-gpt": Family(
        prefixes=("transformer.",),
        config=openai_gpt,
        rules=(
            *_gpt_rules(Transpose(), SplitStacked(transposed=True), SplitStacked()),
            *renamed(("tokens_embed", "embed_tokens"), ("positions_embed", "embed_positions")),
        ),
        ignored=(*_GPT_MASKS, "position_ids"),
        inert=_SUMMARY | {"n_ctx", "n_special", "predict_special_tokens"},
    ),
    "opt": Family(
        prefixes=("model.decoder.", "decoder."),
        config=opt,
        rules=OPT_RULES,
        ignored=("version",),
        inert=frozenset({"activation_dropout"}),
        native=native_bigcode,
    ),
    "phi": Family(
        prefixes=("model.",),
        config=phi,
        rules=PHI_RULES,
        ignored=("layers.{}.self_attn.rotary_emb.inv_freq",),
        native=native_same_class,
    ),
    "xglm": Family(
        prefixes=("model.",),
        config=xglm,
        rules=XGLM_RULES,
        ignored=("embed_positions.weights",),
    ),
}
FAMILIES["gpt-sw3"] = FAMILIES["gpt2"]  # another name that transformers knows it by
