"""Encoder-decoder families: T5 and its relatives, BART and its relatives, Whisper."""

import math
from typing import Any

from mqa_hf.base.errors import ConversionError

from ..operations import DropRows, Flatten, Operation, SinusoidTable
from .base import BIASED_LAYER, COPY, Family, Rule, SourceConfig, module_rules, renamed

SIDES = ("encoder", "decoder")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def _whole(c: SourceConfig, encoder: dict[str, Any], decoder: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the fields of `MQASeq2SeqConfig`."""
    return {
        "encoder": {**encoder, "causal": False, "cross_num_key_value_heads": None},
        "decoder": decoder,
        "tie_word_embeddings": c.tie_word_embeddings,
        **{name: getattr(c, name, None) for name in _TOKENS},
        **fields,
    }


# -- T5 ----------------------------------------------------------------------------------------------------------


def _t5(c: SourceConfig, scaled: bool, bias_per_layer: bool = False) -> dict[str, Any]:
    """T5's layer: RMS norms, no biases, unscaled attention with a learned relative position bias."""
    _ = c.feed_forward_proj  # included in is_gated_act and dense_act_fn
    stack = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_heads,
        "cross_num_key_value_heads": c.num_heads,
        "head_dim": c.d_kv,
        "attention_scale": 1.0,
        "position_embedding": "relative",
        "relative_buckets": c.relative_attention_num_buckets,
        "relative_max_distance": c.relative_attention_max_distance,
        "relative_per_layer": bias_per_layer,
        "norm_eps": c.layer_norm_epsilon,
        "clamp_float16": True,
        "hidden_act": c.dense_act_fn,
        "gated_mlp": c.is_gated_act,
        "logit_scale": c.d_model**-0.5 if scaled else 1.0,
        "attention_dropout": c.dropout_rate,
        "hidden_dropout": c.dropout_rate,
        "embedding_dropout": c.dropout_rate,
        "activation_dropout": c.dropout_rate,
        "initializer_range": 0.05 * c.initializer_factor,
    }
    return _whole(
        c,
        {**stack, "num_hidden_layers": c.num_layers},
        {**stack, "num_hidden_layers": c.num_decoder_layers},
        initializer_range=stack["initializer_range"],
    )


def t5(c: SourceConfig) -> dict[str, Any]:
    return _t5(c, scaled=c.scale_decoder_outputs)


def mt5(c: SourceConfig) -> dict[str, Any]:
    return _t5(c, scaled=getattr(c, "scale_decoder_outputs", False))


def umt5(c: SourceConfig) -> dict[str, Any]:
    c.require("scalable_attention", True, "the transformers class has no other")
    # Before transformers 5.24, the class scales if tie_word_embeddings is set, which its configuration forces.
    return _t5(c, scaled=getattr(c, "scale_decoder_outputs", c.tie_word_embeddings), bias_per_layer=True)


def _t5_rules() -> tuple[Rule, ...]:
    rules = list(renamed(*_EMBEDDINGS))
    for side in SIDES:
        layer, block = f"{side}.layers.{{}}", f"{side}.block.{{}}.layer"
        sublayers = [("SelfAttention", "self_attn", "input_layernorm")]
        if side == "decoder":
            sublayers.append(("EncDecAttention", "cross_attn", "cross_attn_layernorm"))
        for i, (theirs, ours, norm) in enumerate(sublayers):
            rules += renamed(
                *((f"{block}.{i}.{theirs}.{name}", f"{layer}.{ours}.{name}_proj") for name in "qkvo"),
                (f"{block}.{i}.layer_norm", f"{layer}.{norm}"),
            )
        mlp = f"{block}.{len(sublayers)}"
        rules += renamed(
            (f"{block}.0.SelfAttention.relative_attention_bias", f"{layer}.self_attn.relative_bias"),
            (f"{mlp}.DenseReluDense.wi", f"{layer}.mlp.up_proj"),
            (f"{mlp}.DenseReluDense.wi_0", f"{layer}.mlp.gate_proj"),
            (f"{mlp}.DenseReluDense.wi_1", f"{layer}.mlp.up_proj"),
            (f"{mlp}.DenseReluDense.wo", f"{layer}.mlp.down_proj"),
            (f"{mlp}.layer_norm", f"{layer}.post_attention_layernorm"),
            (f"{side}.final_layer_norm", f"{side}.norm"),
        )
    return tuple(rules)


# -- BART --------------------------------------------------------------------------------------------------------


def _bart(c: SourceConfig, *, pre_norm: bool, embedding_norm: bool, **fields: Any) -> dict[str, Any]:
    """BART's layer: layer norms before or after each sub-layer, biases everywhere.

    `fields` apply to both stacks, except that `encoder` and `decoder` hold the fields of one stack.
    """
    _ = c.encoder_layerdrop, c.decoder_layerdrop  # skip whole layers while training only
    own = {side: fields.pop(side, {}) for side in SIDES}
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        **BIASED_LAYER,
        "norm_eps": 1e-5,
        "residual": "sequential" if pre_norm else "post_norm",
        "final_norm": pre_norm,
        "embedding_norm": embedding_norm,
        "embedding_scale": math.sqrt(c.d_model) if c.scale_embedding else 1.0,
        "hidden_act": c.activation_function,
        "attention_dropout": c.attention_dropout,
        "hidden_dropout": c.dropout,
        "embedding_dropout": c.dropout,
        "activation_dropout": c.activation_dropout,
        "initializer_range": c.init_std,
        **fields,
    }
    heads = {"encoder": c.encoder_attention_heads, "decoder": c.decoder_attention_heads}
    layers = {"encoder": c.encoder_layers, "decoder": c.decoder_layers}
    widths = {"encoder": c.encoder_ffn_dim, "decoder": c.decoder_ffn_dim}
    stacks = {
        side: {
            **shared,
            "num_attention_heads": heads[side],
            "num_key_value_heads": heads[side],
            "cross_num_key_value_heads": heads[side],
            "num_hidden_layers": layers[side],
            "intermediate_size": widths[side],
            "clamp_float16": side == "encoder",
            **own[side],
        }
        for side in SIDES
    }
    return _whole(c, stacks["encoder"], stacks["decoder"], initializer_range=c.init_std)


def _learned(c: SourceConfig) -> dict[str, Any]:
    return {"position_embedding": "learned", "max_position_embeddings": c.max_position_embeddings}


def _sinusoidal(c: SourceConfig, **fields: Any) -> dict[str, Any]:
    return {"position_embedding": "sinusoidal", "max_position_embeddings": c.max_position_embeddings, **fields}


HEAD_BIAS = {"decoder": {"lm_head_bias": True}}


def bart(c: SourceConfig) -> dict[str, Any]:
    return _bart(c, pre_norm=False, embedding_norm=True, **_learned(c), **HEAD_BIAS)


def mvp(c: SourceConfig) -> dict[str, Any]:
    c.require("use_prompt", False, "its prompts are keys and values that do not come from a projection")
    return bart(c)


def mbart(c: SourceConfig) -> dict[str, Any]:
    fields = _bart(c, pre_norm=True, embedding_norm=True, **_learned(c), **HEAD_BIAS)
    return {**fields, "start_is_last_label": True}


def plbart(c: SourceConfig) -> dict[str, Any]:
    return {**bart(c), "start_is_last_label": True}


def blenderbot(c: SourceConfig) -> dict[str, Any]:
    c.require("layernorm_variant", "prelayernorm", "the transformers class normalises before each sub-layer")
    c.require("extra_layer_norm", False, "the transformers class has none")
    _ = getattr(c, "do_blenderbot_90_layernorm", None)  # only for the 90M model, which has another class
    return _bart(c, pre_norm=True, embedding_norm=False, **_learned(c), **HEAD_BIAS)


def pegasus(c: SourceConfig) -> dict[str, Any]:
    return _bart(c, pre_norm=True, embedding_norm=False, **_sinusoidal(c), **HEAD_BIAS)


def m2m_100(c: SourceConfig) -> dict[str, Any]:
    if c.decoder_start_token_id is not None and c.decoder_start_token_id == c.pad_token_id:
        raise ConversionError(
            f"m2m_100: decoding starts with the padding token ({c.pad_token_id}), which has no position in its class"
        )
    # The first token's position follows that of padding.
    positions = _sinusoidal(c, sinusoidal_endpoint=True, position_offset=c.pad_token_id + 1, positions_from_mask=True)
    return _bart(c, pre_norm=True, embedding_norm=False, **positions)


def marian(c: SourceConfig) -> dict[str, Any]:
    shared = c.share_encoder_decoder_embeddings
    target = c.vocab_size if shared else c.decoder_vocab_size
    _ = c.decoder_vocab_size
    decoder = {"lm_head_bias": True, "vocab_size": target}
    fields = _bart(c, pre_norm=False, embedding_norm=False, **_sinusoidal(c), decoder=decoder)
    return {**fields, "share_embeddings": shared}


def blenderbot_small(c: SourceConfig) -> dict[str, Any]:
    c.require("layernorm_variant", "xlm", "the transformers class normalises after each sub-layer")
    c.require("extra_layer_norm", False, "the transformers class has none")
    decoder = {**HEAD_BIAS["decoder"], "embedding_norm_first": True}
    return _bart(c, pre_norm=False, embedding_norm=True, **_learned(c), decoder=decoder)


def fsmt(c: SourceConfig) -> dict[str, Any]:
    if c.decoder_start_token_id is not None and c.decoder_start_token_id == c.pad_token_id:
        raise ConversionError(
            f"fsmt: decoding starts with the padding token ({c.pad_token_id}), which has no position in its class"
        )
    if c.d_model % 2:
        raise ConversionError(f"fsmt: d_model={c.d_model} must be even for sinusoidal positions")
    # The first token's position follows that of padding.
    positions = _sinusoidal(c, sinusoidal_endpoint=True, position_offset=c.pad_token_id + 1, positions_from_mask=True)
    encoder, decoder = {"vocab_size": c.src_vocab_size}, {"vocab_size": c.tgt_vocab_size}
    one = c.tie_word_embeddings  # the class then ties both embeddings to the head
    scaled = {"scale_inputs_embeds": True}
    fields = _bart(c, pre_norm=False, embedding_norm=False, **positions, **scaled, encoder=encoder, decoder=decoder)
    return {**fields, "share_embeddings": bool(one)}


def whisper(c: SourceConfig) -> dict[str, Any]:
    encoder = {
        "num_mel_bins": c.num_mel_bins,
        "max_position_embeddings": c.max_source_positions,
        "embedding_scale": 1.0,
    }
    # The class computes the scale for `scale_embedding` but never applies it.
    decoder = {"max_position_embeddings": c.max_target_positions, "embedding_scale": 1.0}
    fields = _bart(
        c, pre_norm=True, embedding_norm=False, position_embedding="learned", encoder=encoder, decoder=decoder
    )
    return {
        **fields,
        "share_embeddings": False,
        "median_filter_width": c.median_filter_width,
        "forced_decoder_ids": getattr(c, "forced_decoder_ids", None),
    }


def _bart_rules(positions: Operation = COPY) -> tuple[Rule, ...]:
    rules = list(renamed(*_EMBEDDINGS))
    rules.append(Rule("final_logits_bias", ("lm_head.bias",), Flatten()))
    for side in SIDES:
        layer = f"{side}.layers.{{}}"
        attentions = [("self_attn", "self_attn", "self_attn_layer_norm", "input_layernorm")]
        if side == "decoder":
            attentions.append(("encoder_attn", "cross_attn", "encoder_attn_layer_norm", "cross_attn_layernorm"))
        for theirs, ours, their_norm, norm in attentions:
            rules += renamed(
                (f"{layer}.{theirs}.q_proj", f"{layer}.{ours}.q_proj"),
                (f"{layer}.{theirs}.v_proj", f"{layer}.{ours}.v_proj"),
                (f"{layer}.{theirs}.out_proj", f"{layer}.{ours}.o_proj"),
                (f"{layer}.{their_norm}", f"{layer}.{norm}"),
            )
            rules.append(Rule(f"{layer}.{theirs}.k_proj.weight", (f"{layer}.{ours}.k_proj.weight",)))
            rules.append(Rule(f"{layer}.{theirs}.k_proj.bias", (None,)))
        rules += renamed(
            (f"{layer}.fc1", f"{layer}.mlp.up_proj"),
            (f"{layer}.fc2", f"{layer}.mlp.down_proj"),
            (f"{layer}.final_layer_norm", f"{layer}.post_attention_layernorm"),
            (f"{side}.layernorm_embedding", f"{side}.embed_norm"),
            (f"{side}.layer_norm", f"{side}.norm"),
        )
        table = f"{side}.embed_positions.weight"
        rules.append(Rule(table, (None if isinstance(positions, SinusoidTable) else table,), positions))
    return tuple(rules)


_EMBEDDINGS = (
    ("shared", "decoder.embed_tokens"),
    ("decoder.embed_tokens", "decoder.embed_tokens"),
    ("encoder.embed_tokens", "encoder.embed_tokens"),
    ("lm_head", "lm_head"),
)


# -- the rows ----------------------------------------------------------------------------------------------------


def _t5_family(config, **fields: Any) -> Family:
    return Family(
        prefixes=("",),
        config=config,
        rules=_t5_rules(),
        # Old files also have a bias for cross-attention, which was never used.
        ignored=("decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight",),
        inert=frozenset({"classifier_dropout", "n_positions", "output_past", "is_gated_act", "dense_act_fn"}),
        **fields,
    )


# Switches of fairseq's BART in published files; the transformers class has only one form.
_NOTES = frozenset(
    {"add_bias_logits", "add_final_layer_norm", "extra_pos_embeddings", "force_bos_token_to_be_generated"}
)
_NOTES |= {"normalize_before", "normalize_embedding", "static_position_embeddings", "num_hidden_layers", "output_past"}
_NOTES |= {"classif_dropout", "classifier_dropout", "save_step"}
_NOTES |= {"replacing_rate", "student_encoder_layers", "student_decoder_layers"}  # how distilbart was made


def _bart_family(config, positions: Operation = COPY, rules: tuple[Rule, ...] = (), **fields: Any) -> Family:
    inert = _NOTES | fields.pop("inert", frozenset())
    ignored = ("encoder.version", "decoder.version", "model.encoder.version", *fields.pop("ignored", ()))
    return Family(
        prefixes=("model.",),
        config=config,
        rules=_bart_rules(positions) + rules,
        inert=inert,
        ignored=ignored,
        **fields,
    )


_SPEC_AUGMENT = frozenset(
    f"mask_{kind}_{what}" for kind in ("time", "feature") for what in ("prob", "length", "min_masks")
)

FAMILIES = {
    "bart": _bart_family(bart, DropRows(2)),
    "blenderbot": _bart_family(blenderbot),
    "blenderbot-small": _bart_family(blenderbot_small, inert=frozenset({"do_blenderbot_90_layernorm", "variant"})),
    "fsmt": _bart_family(
        fsmt,
        SinusoidTable(padded=True),
        rules=renamed(("decoder.output_projection", "lm_head")),
        inert=frozenset({"decoder", "langs"}),  # fairseq's other decoder, which the class does not read
    ),
    "m2m_100": _bart_family(m2m_100, ignored=("encoder.embed_positions.weights", "decoder.embed_positions.weights")),
    "marian": _bart_family(marian, SinusoidTable()),
    "mbart": _bart_family(mbart, DropRows(2)),
    "mt5": _t5_family(mt5),
    "mvp": _bart_family(mvp, DropRows(2), inert=frozenset({"prompt_length", "prompt_mid_dim"})),
    "pegasus": _bart_family(pegasus, SinusoidTable()),
    "plbart": _bart_family(plbart, DropRows(2)),
    "t5": _t5_family(t5),
    "umt5": _t5_family(umt5),
    "whisper": _bart_family(
        whisper,
        rules=(
            *renamed(("proj_out", "lm_head")),
            *module_rules("encoder.conv1", "encoder.conv1"),
            *module_rules("encoder.conv2", "encoder.conv2"),
        ),
        inert=_SPEC_AUGMENT | {"apply_spec_augment", "use_weighted_layer_sum", "classifier_proj_size"},
    ),
}
