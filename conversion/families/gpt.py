"""GPT-2 and its contemporaries: layer norms, plain MLPs, biases; learned or sinusoidal positions."""

from typing import Any

from transformers import GPTBigCodeConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig

from ..operations import (
    Copy,
    DropRows,
    Operation,
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
    refuse,
    renamed,
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
    c.require("learned_embeddings", True, "the transformers class has learned positions")
    c.require("scale_embeddings", False, "the transformers class does not scale embeddings")
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
    _ = c.attention_types  # included in attention_layers
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
        # The class zeroes this row of its position table. It never uses the first two rows.
        raise ConversionError(
            f"xglm: pad_token_id={c.pad_token_id} zeroes the sinusoid of position {c.pad_token_id - 2}; use 0 or 1"
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


def ctrl(c: SourceConfig) -> dict[str, Any]:
    c.require("layer_norm_epsilon", 1e-6, "the norms of layers have it")
    if c.hidden_size % 2:
        raise ConversionError(f"ctrl: n_embd={c.hidden_size} must be even for sinusoidal positions")
    return shared(
        c,
        intermediate_size=c.dff,
        num_key_value_heads=c.num_attention_heads,
        position_embedding="sinusoidal",
        embedding_scale=c.hidden_size**0.5,
        scale_inputs_embeds=True,
        norm_eps=1e-6,
        hidden_act="relu",
        lm_head_bias=True,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        **BIASED_LAYER,
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


_GPT_NAMES = (
    ("wte", "embed_tokens"),
    ("wpe", "embed_positions"),
    ("h.{}.ln_1", "layers.{}.input_layernorm"),
    ("h.{}.ln_2", "layers.{}.post_attention_layernorm"),
    ("ln_f", "norm"),
    ("lm_head", "lm_head"),
)


def _gpt_rules(linear: Operation, fused: Operation, fused_bias: Operation) -> tuple[Rule, ...]:
    # Without rotary positions, softmax cancels a constant added to every key, so the key bias is dropped.
    return (
        *renamed(*_GPT_NAMES),
        Rule("h.{}.attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV), fused),
        Rule("h.{}.attn.c_attn.bias", (f"{QKV[0]}.bias", None, f"{QKV[2]}.bias"), fused_bias),
        *module_rules("h.{}.attn.c_proj", f"{ATTENTION}o_proj", operation=linear, bias=COPY),
        *module_rules("h.{}.mlp.c_fc", "layers.{}.mlp.up_proj", operation=linear, bias=COPY),
        *module_rules("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj", operation=linear, bias=COPY),
    )


# OPT, XGLM and BioGPT; their final norms and heads have different names.
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

_CTRL_ATTENTION = "h.{}.multi_head_attention."
CTRL_RULES = (
    *renamed(
        ("w", "embed_tokens"),
        (f"{_CTRL_ATTENTION}Wq", QKV[0]),
        (f"{_CTRL_ATTENTION}Wv", QKV[2]),
        (f"{_CTRL_ATTENTION}dense", f"{ATTENTION}o_proj"),
        ("h.{}.layernorm1", "layers.{}.input_layernorm"),
        ("h.{}.layernorm2", "layers.{}.post_attention_layernorm"),
        ("h.{}.ffn.0", "layers.{}.mlp.up_proj"),
        ("h.{}.ffn.2", "layers.{}.mlp.down_proj"),
        ("layernorm", "norm"),
        ("lm_head", "lm_head"),
    ),
    Rule(f"{_CTRL_ATTENTION}Wk.weight", (f"{QKV[1]}.weight",)),
    Rule(f"{_CTRL_ATTENTION}Wk.bias", (None,)),
)

SUMMARY = frozenset(
    f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
)
GPT_MASKS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")

FAMILIES = {
    "biogpt": Family(
        prefixes=("biogpt.",),
        config=biogpt,
        rules=BIOGPT_RULES,
        inert=frozenset({"layer_norm_eps"}),  # the class's norms have the default
    ),
    "ctrl": Family(
        prefixes=("transformer.",),
        config=ctrl,
        rules=CTRL_RULES,
        inert=SUMMARY | {"attn_pdrop", "from_tf", "n_ctx", "output_past"},
    ),
    "gpt2": Family(
        prefixes=("transformer.",),
        config=gpt2,
        rules=_gpt_rules(Transpose(), SplitStacked(transposed=True), SplitStacked()),
        ignored=GPT_MASKS,
        inert=SUMMARY | {"reorder_and_upcast_attn", "n_ctx", "n_special", "predict_special_tokens", "output_past"},
        scales=gpt2_scales,
        native=native_bigcode,
    ),
    "gpt_bigcode": Family(
        prefixes=("transformer.",),
        config=gpt_bigcode,
        rules=_gpt_rules(Copy(), SplitGrouped(), SplitGrouped()),
        ignored=GPT_MASKS,
        # SantaCoder and StarCoder have the last two lines in their files; the class reads none of them.
        inert=SUMMARY
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
        inert=SUMMARY | {"classifier_dropout"},
        native=native_bigcode,
    ),
    "openai-gpt": Family(
        prefixes=("transformer.",),
        config=openai_gpt,
        rules=(
            *_gpt_rules(Transpose(), SplitStacked(transposed=True), SplitStacked()),
            *renamed(("tokens_embed", "embed_tokens"), ("positions_embed", "embed_positions")),
        ),
        ignored=(*GPT_MASKS, "position_ids"),
        inert=SUMMARY | {"n_ctx", "n_special", "predict_special_tokens"},
    ),
    "opt": Family(
        prefixes=("model.decoder.", "decoder."),
        config=opt,
        rules=OPT_RULES,
        ignored=("version",),
        inert=frozenset({"activation_dropout"}),
        native=native_bigcode,
    ),
    "xglm": Family(
        prefixes=("model.",),
        config=xglm,
        rules=XGLM_RULES,
        ignored=("embed_positions.weights",),
    ),
}
FAMILIES["gpt-sw3"] = FAMILIES["gpt2"]  # transformers' other name for it
