"""Mixtures of experts with other routers, inner layers, gates or files than those of `experts.py`."""

from typing import Any

from mqa_hf.base.errors import ConversionError

from ..operations import ExpertColumns, ExpertRows, SplitStacked
from .base import ATTENTION, QKV, Family, Rule, SourceConfig, Stacked, module_rules, one_window, renamed, rope, windows
from .experts import EXPERTS, MLP, after, expert_rules, mixture, one_mixture, router_rules
from .llama import LLAMA_RULES, llama_layer
from .normalised import IN, MLP_IN, MLP_OUT, OUT, SINKS, head_norms, rotated, without

SLOPE = 1.702  # of the sigmoid in gpt-oss's gated unit, the only one that the canonical model has


def gpt_oss(c: SourceConfig) -> dict[str, Any]:
    _ = c.hidden_act  # the inner layer of experts has another
    c.require("swiglu_alpha", SLOPE, "the canonical model has no other slope")
    bias = c.attention_bias
    layer = llama_layer(
        c, qkv_bias=bias, output_bias=bias, mlp_bias=False, attention_sinks=True, hidden_act="silu", **windows(c)
    )
    experts = mixture(
        c,
        c.intermediate_size,
        num_experts=c.num_local_experts,
        expert_bias=True,
        expert_limit=getattr(c, "swiglu_limit", 7.0),
        router_bias=True,
    )
    return {**layer, **experts}


def phimoe(c: SourceConfig) -> dict[str, Any]:
    c.require("num_experts_per_tok", 2, "the transformers class chooses two")
    bias = c.attention_bias
    layer = llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        norm_type="layer_norm",
        lm_head_bias=c.lm_head_bias,
        **one_window(c),
        **scaled_rope(c),
    )
    experts = mixture(
        c,
        c.intermediate_size,
        num_experts=c.num_local_experts,
        router_scores="sparsemixer",
        router_jitter=c.router_jitter_noise,
        router_renormalise=False,
    )
    return {**layer, **experts}


def scaled_rope(c: SourceConfig) -> dict[str, Any]:
    """PhiMoE's rotary parameters. Its class scales cosines by factors of its own, and never uses the long factors."""
    parameters = dict(c.rope_parameters)
    short, long = parameters.pop("short_mscale", None), parameters.pop("long_mscale", None)
    if parameters["rope_type"] == "default":
        return rope(c)
    if short != long:
        raise ConversionError(
            f"phimoe: short_mscale ({short}) and long_mscale ({long}) differ; only one scale for all lengths is "
            "supported"
        )
    if "short_factor" in parameters:
        parameters["long_factor"] = parameters["short_factor"]
    _ = getattr(c, "original_max_position_embeddings", None)  # included in rope_parameters
    return {"position_embedding": "rotary", "rope_parameters": {**parameters, "attention_factor": short}}


def dbrx(c: SourceConfig) -> dict[str, Any]:
    a, f = SourceConfig(c.attn_config), SourceConfig(c.ffn_config)
    theta, read = a.rope_theta, c.rope_parameters["rope_theta"]
    if theta != read:
        raise ConversionError(
            f"dbrx: attn_config has rope_theta {theta:g}, and transformers computes with rope_parameters, which has "
            f'{read:g}; add "rope_parameters": {{"rope_type": "default", "rope_theta": {theta:g}}} to config.json'
        )
    power = f.moe_normalize_expert_weights
    if power not in (None, 1):
        raise ConversionError(f"dbrx: moe_normalize_expert_weights={power} is not supported; only 1 and null are")
    layer = llama_layer(
        c,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        num_key_value_heads=a.kv_n_heads,
        intermediate_size=f.ffn_hidden_size,
        hidden_act=f.ffn_act_fn["name"],
        norm_type="layer_norm",
        norm_bias=False,
        norm_eps=1e-5,
        clip_qkv=a.clip_qkv,
        attention_dropout=a.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.emb_pdrop,
    )
    experts = {
        "num_experts": f.moe_num_experts,
        "num_experts_per_tok": f.moe_top_k,
        "expert_intermediate_size": f.ffn_hidden_size,
        "router_renormalise": power == 1,
    }
    return {**layer, **experts}


def aria_text(c: SourceConfig) -> dict[str, Any]:
    c.require("hidden_act", "silu", "its experts have no other")
    c.require("mlp_bias", False, "experts have no biases")
    bias = c.attention_bias
    experts = {
        "num_experts": c.moe_num_experts,
        "num_experts_per_tok": c.moe_topk,
        "expert_intermediate_size": c.intermediate_size,
        "shared_expert_intermediate_size": c.intermediate_size * c.moe_num_shared_experts or None,
    }
    return {**llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False), **experts}


def flint(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    layer = llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        qk_norm="head",
        attention_sinks=True,
        rope_layers=[kind == "sliding_attention" for kind in c.layer_types],
        **windows(c),
    )
    dense = set(c.mlp_only_layers or ())
    every = getattr(c, "decoder_sparse_step", 1)
    experts = mixture(
        c,
        c.moe_intermediate_size,
        [i not in dense and (i + 1) % every == 0 for i in range(c.num_hidden_layers)],
        router_scores="sigmoid",
        router_renormalise=c.norm_topk_prob,
        shared_expert_intermediate_size=c.shared_expert_intermediate_size,
    )
    return {**layer, **experts}


def kolibri1(c: SourceConfig) -> dict[str, Any]:
    layer = llama_layer(
        c,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        intermediate_size=c.moe_intermediate_size,
        qk_norm="head",
        residual="sandwich",
        rope_layers=rotated(c),
        **windows(c),
    )
    experts = mixture(
        c,
        c.moe_intermediate_size,
        router_scores="sigmoid",
        router_choice="logits",
        router_correction=True,
        router_renormalise=c.norm_topk_prob,
        shared_expert_intermediate_size=c.shared_expert_intermediate_size,
    )
    return {**layer, **experts}


def afmoe(c: SourceConfig) -> dict[str, Any]:
    _ = c.global_attn_every_n_layers  # settled in layer_types
    c.require("score_func", "sigmoid", "the transformers class has sigmoids")
    c.require("route_norm", True, "the transformers class divides the weights by their sum")
    for name in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        c.require(name, 1, "the transformers class has no groups")
    bias = c.attention_bias
    layer = llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        qk_norm="head",
        residual="sandwich",
        attention_gate=True,
        embedding_scale=c.hidden_size**0.5 if c.mup_enabled else 1.0,
        scale_inputs_embeds=bool(c.mup_enabled),
        rope_layers=[kind == "sliding_attention" for kind in c.layer_types],
        **windows(c),
    )
    experts = mixture(
        c,
        c.moe_intermediate_size,
        after(c, c.num_dense_layers or 0),
        router_scores="sigmoid",
        router_correction=True,
        router_scale=c.route_scale,
        shared_expert_intermediate_size=c.moe_intermediate_size * c.num_shared_experts or None,
    )
    return {**layer, **experts}


_COLUMNS = (
    Rule(f"{EXPERTS}.gate_up_proj", (f"{EXPERTS}.gate_up_proj",), ExpertColumns()),
    Rule(f"{EXPERTS}.down_proj", (f"{EXPERTS}.down_proj",), ExpertColumns()),
)
_OLD_COLUMNS = (
    Rule(f"{EXPERTS}.fc1.weight", (f"{EXPERTS}.gate_up_proj",), ExpertColumns()),
    Rule(f"{EXPERTS}.fc2.weight", (f"{EXPERTS}.down_proj",), ExpertColumns()),
)
ARIA_RULES = (*LLAMA_RULES, *_COLUMNS, *_OLD_COLUMNS, *router_rules(f"{MLP}router", shared="shared_experts"))
GPT_OSS_RULES = (
    *LLAMA_RULES,
    SINKS,
    Rule(f"{EXPERTS}.gate_up_proj", (f"{EXPERTS}.gate_up_proj",), ExpertColumns(interleaved=True)),
    Rule(f"{EXPERTS}.gate_up_proj_bias", (f"{EXPERTS}.gate_up_proj_bias",), ExpertColumns(False, interleaved=True)),
    _COLUMNS[1],
    Rule(f"{EXPERTS}.down_proj_bias", (f"{EXPERTS}.down_proj_bias",)),
    *router_rules(f"{MLP}router"),
)
_PHIMOE = "layers.{}.block_sparse_moe."  # in Microsoft's files
PHIMOE_RULES = (
    *LLAMA_RULES,
    *expert_rules(),
    *router_rules(f"{MLP}router"),
    *expert_rules(f"{_PHIMOE}experts.gate_up_proj", f"{_PHIMOE}experts.down_proj"),
    *router_rules(f"{_PHIMOE}gate"),
)
PHIMOE_ONE_BY_ONE = tuple(
    Stacked(f"{module}experts", {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)})
    for module in (MLP, _PHIMOE)
)
_BLOCK = "blocks.{}.norm_attn_norm."
_DBRX_EXPERTS = "blocks.{}.ffn.experts.mlp"
DBRX_RULES = (
    *renamed(
        ("wte", "embed_tokens"),
        (f"{_BLOCK}norm_1", IN),
        (f"{_BLOCK}norm_2", MLP_IN),
        (f"{_BLOCK}attn.out_proj", f"{ATTENTION}o_proj"),
        ("blocks.{}.ffn.router.layer", f"{MLP}router"),
        ("norm_f", "norm"),
        ("lm_head", "lm_head"),
    ),
    *module_rules(f"{_BLOCK}attn.Wqkv", *QKV, operation=SplitStacked()),
    Rule(f"{_DBRX_EXPERTS}.w1v1", (f"{EXPERTS}.gate_up_proj",), ExpertRows()),
    Rule(f"{_DBRX_EXPERTS}.w2", (f"{EXPERTS}.down_proj",), ExpertRows(outputs=True)),
)
FLINT_RULES = (
    *LLAMA_RULES,
    *head_norms(),
    SINKS,
    Rule(f"{ATTENTION}softmax_offset", SINKS.targets),  # in published files
    *expert_rules(),
    *router_rules(shared="shared_expert"),
)
KOLIBRI_RULES = (
    *LLAMA_RULES,
    *head_norms(),
    *renamed(("layers.{}.post_self_attn_layernorm", OUT), ("layers.{}.post_mlp_layernorm", MLP_OUT)),
    *renamed(("layers.{}.post_attn_norm", OUT), ("layers.{}.post_ffn_norm", MLP_OUT)),  # in published files
    Rule("layers.{}.moe.router.expert_bias", (f"{MLP}router_correction",)),
    *expert_rules(),
    *router_rules(shared="shared_experts", correction=f"{MLP}gate.e_score_correction_bias"),
)
AFMOE_RULES = (
    *without(LLAMA_RULES, MLP_IN),
    *renamed(
        ("layers.{}.post_attention_layernorm", OUT),
        ("layers.{}.pre_mlp_layernorm", MLP_IN),
        ("layers.{}.post_mlp_layernorm", MLP_OUT),
        (f"{ATTENTION}gate_proj", f"{ATTENTION}gate_proj"),
    ),
    *head_norms(),
    *expert_rules(),
    *router_rules(f"{MLP}router.gate", shared="shared_experts", correction=f"{MLP}expert_bias"),
)

FAMILIES: dict[str, Family] = {
    "afmoe": one_mixture(afmoe, AFMOE_RULES, frozenset({"load_balance_coeff", "use_grouped_mm"})),
    "aria_text": one_mixture(aria_text, ARIA_RULES, frozenset({"pretraining_tp"}), ()),
    "dbrx": one_mixture(
        dbrx,
        DBRX_RULES,
        stacked=(Stacked(_DBRX_EXPERTS, {"w1v1": ("w1", "v1")}, numbered=False),),
        inert=frozenset({"num_key_value_heads"}),  # that of attn_config, which the class copies
        prefixes=("transformer.",),
    ),
    "flint": one_mixture(flint, FLINT_RULES),
    # Other names of sizes; the class never reads them.
    "gpt_oss": one_mixture(gpt_oss, GPT_OSS_RULES, frozenset({"experts_per_token", "initial_context_length"}), ()),
    "kolibri1": one_mixture(kolibri1, KOLIBRI_RULES),
    "phimoe": one_mixture(
        phimoe, PHIMOE_RULES, frozenset({"hidden_dropout", "input_jitter_noise"}), PHIMOE_ONE_BY_ONE
    ),
}
