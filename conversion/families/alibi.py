"""Models with ALiBi (arXiv 2108.12409), including Falcon, which has it in some sizes."""

import copy
import math
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.configuration_mqa import MQAConfig

from ..operations import SplitGrouped, SplitStacked
from .base import ATTENTION, BIASED_LAYER, QKV, Family, Rule, SourceConfig, module_rules, refuse, renamed, rope, shared


def geometric_slopes(heads: int) -> list[float]:
    """Return the paper's slopes: 2^(-8/n), its square, ... for the first n heads, where n is the largest power of two,
    then every second slope for 2·n heads."""
    n = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]


def mpt_slopes(heads: int) -> list[float]:
    """Return MPT's slopes: those for the next power of two, every second one first."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    return slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads]


def bloom(c: SourceConfig) -> dict[str, Any]:
    c.require("apply_residual_connection_post_layernorm", False, "the residual stream would start after the norms")
    _ = c.pretraining_tp  # read only with slow_but_exact
    c.require("slow_but_exact", False, "its class then omits biases if pretraining_tp is above 1")
    return shared(
        c,
        intermediate_size=4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        max_position_embeddings=getattr(c, "seq_length", None) or 2048,
        position_embedding="alibi",
        positions_from_mask=True,
        alibi_slopes=geometric_slopes(c.num_attention_heads),
        embedding_norm=True,
        norm_eps=c.layer_norm_epsilon,
        hidden_act="gelu_pytorch_tanh",
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.hidden_dropout,
        **BIASED_LAYER,
    )


def mpt(c: SourceConfig) -> dict[str, Any]:
    c.require("logit_scale", None, "the transformers class does not apply it")
    c.require("no_bias", True, "the transformers class has no biases")
    c.require("expansion_ratio", 4, "the transformers class fixes it at 4")
    if c.norm_type not in ("low_precision_layernorm", "layernorm"):
        raise ConversionError(
            f"mpt: norm_type={c.norm_type!r} is not supported; the transformers class has layer norms only"
        )
    a = SourceConfig(c.attn_config)
    a.require("attn_type", "multihead_attention", "the transformers class has no other")
    a.require("qk_ln", False, "normalising queries and keys does not commute with pooling")
    a.require("prefix_lm", False, "attention within a prefix is bidirectional")
    a.require("alibi", True, "the transformers class has no other positions")
    a.require("alibi_bias_max", 8, "the transformers class fixes it at 8")
    unknown = set(c.attn_config.to_dict()) - set(MptAttentionConfig().to_dict())
    if unknown:
        raise ConversionError(f"mpt: unknown switches in attn_config: {listing(unknown)}")
    return shared(
        c,
        intermediate_size=4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        max_position_embeddings=c.max_seq_len,
        attention_scale=a.softmax_scale,
        clip_qkv=a.clip_qkv,
        position_embedding="alibi",
        alibi_slopes=mpt_slopes(c.num_attention_heads),
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        norm_bias=False,
        hidden_act="gelu",
        gated_mlp=False,
        attention_dropout=a.attn_pdrop,
        hidden_dropout=a.attn_pdrop,
    )


def falcon(c: SourceConfig) -> dict[str, Any]:
    new, parallel, norms, bias = c.new_decoder_architecture, c.parallel_attn, c.num_ln_in_parallel_attn, c.bias
    one_head, kv_heads, dropout = c.multi_query, c.num_kv_heads, c.attention_dropout
    c.require("apply_residual_connection_post_layernorm", False, "the transformers class does not support it")
    heads, D = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    if new and not parallel:
        raise ConversionError("falcon: its class cannot run new_decoder_architecture without parallel_attn")
    if not new and norms == 2:
        raise ConversionError(
            "falcon: its class cannot run num_ln_in_parallel_attn=2 without new_decoder_architecture"
        )
    if not new and not one_head and kv_heads != heads:
        raise ConversionError(f"falcon: num_kv_heads={kv_heads} needs new_decoder_architecture")
    fields = rope(c)
    if c.alibi:
        # The class rounds slopes to bfloat16 and adds biases before scaling.
        slopes = torch.tensor(geometric_slopes(heads)).bfloat16().tolist()
        scaled = [slope / D**0.5 for slope in slopes]
        fields = {"position_embedding": "alibi", "alibi_slopes": scaled}
        fields |= {"alibi_bfloat16": True, "positions_from_mask": True}
    return shared(
        c,
        intermediate_size=c.ffn_hidden_size,
        num_key_value_heads=kv_heads if new else 1 if one_head else heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        residual="sequential" if not parallel else "parallel" if new and norms != 1 else "parallel_shared_norm",
        hidden_act=c.activation,
        gated_mlp=False,
        query_bias=bias,
        key_bias=bias and not c.alibi,
        value_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        attention_dropout=dropout if c.alibi else 0.0,  # the class has none with rotary positions
        hidden_dropout=c.hidden_dropout,
        **fields,
    )


def native_falcon(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    heads, all_heads = config.num_key_value_heads, config.num_attention_heads
    grouped = 1 < heads < all_heads and not source.new_decoder_architecture
    refuse("falcon", {f"{heads} key/value heads without new_decoder_architecture": grouped})
    native: Any = copy.deepcopy(source)
    native.num_kv_heads = heads if source.new_decoder_architecture else all_heads
    native.multi_query = heads == 1
    return native


_FALCON_NAMES = (
    ("word_embeddings", "embed_tokens"),
    ("h.{}.input_layernorm", "layers.{}.input_layernorm"),
    ("h.{}.post_attention_layernorm", "layers.{}.post_attention_layernorm"),
    ("h.{}.self_attention.dense", f"{ATTENTION}o_proj"),
    ("h.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
    ("h.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
    ("ln_f", "norm"),
    ("lm_head", "lm_head"),
)

BLOOM_RULES = (
    *renamed(*_FALCON_NAMES, ("word_embeddings_layernorm", "embed_norm")),
    *module_rules("h.{}.self_attention.query_key_value", *QKV, operation=SplitGrouped()),
)

FALCON_RULES = (
    *renamed(
        *_FALCON_NAMES,
        ("h.{}.ln_attn", "layers.{}.input_layernorm"),
        ("h.{}.ln_mlp", "layers.{}.post_attention_layernorm"),
    ),
    *module_rules("h.{}.self_attention.query_key_value", *QKV, operation=SplitGrouped()),
)

MPT_RULES: tuple[Rule, ...] = (
    *renamed(
        ("wte", "embed_tokens"),
        ("blocks.{}.norm_1", "layers.{}.input_layernorm"),
        ("blocks.{}.norm_2", "layers.{}.post_attention_layernorm"),
        ("blocks.{}.attn.out_proj", f"{ATTENTION}o_proj"),
        ("blocks.{}.ffn.up_proj", "layers.{}.mlp.up_proj"),
        ("blocks.{}.ffn.down_proj", "layers.{}.mlp.down_proj"),
        ("norm_f", "norm"),
        ("lm_head", "lm_head"),
    ),
    *module_rules("blocks.{}.attn.Wqkv", *QKV, operation=SplitStacked()),
)

FAMILIES = {
    "bloom": Family(
        prefixes=("transformer.",),
        config=bloom,
        rules=BLOOM_RULES,
        # Settings of the training framework; the class reads none of them.
        inert=frozenset(
            {"attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_embed", "n_inner"}
            | {"offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id"}
        ),
    ),
    "falcon": Family(
        prefixes=("transformer.",),
        config=falcon,
        rules=FALCON_RULES,
        ignored=("h.{}.self_attention.rotary_emb.inv_freq",),
        inert=frozenset({"ff_factor"}),  # the class reads ffn_hidden_size instead
        native=native_falcon,
    ),
    "mpt": Family(
        prefixes=("transformer.",),
        config=mpt,
        rules=MPT_RULES,
        # Initialisation, logging, gradients (embedding_fraction); dropouts and positions that the class never reads.
        inert=frozenset(
            {"embedding_fraction", "emb_pdrop", "init_config", "init_device", "learned_pos_emb", "resid_pdrop"}
            | {"tokenizer_name", "verbose"}
        ),
    ),
}
