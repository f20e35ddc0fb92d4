"""Rotary models whose MLPs are mixtures of experts, stored together or one by one."""

from typing import Any

from ..operations import Flatten, SplitGateUp
from .base import (
    Family,
    Rule,
    SourceConfig,
    Stacked,
    module_rules,
    one_window,
    renamed,
    rope,
    windows,
)
from .llama import INTERLEAVED_LLAMA_RULES, LLAMA_RULES, llama_layer, qwen2
from .normalised import OLMO2_RULES, SINKS, granite_swa, head_norms, hunyuan, olmo2, rotated
from .variants import _family, granite

ROUTING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})  # of training


def mixture(c: SourceConfig, width: int, layers: list[bool] | None = None, **fields: Any) -> dict[str, Any]:
    """The fields of a mixture in these layers, by default in all, with experts of this width."""
    return {
        "num_experts": fields.pop("num_experts", None) or c.num_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "expert_intermediate_size": width,
        "expert_layers": [True] * c.num_hidden_layers if layers is None else layers,
        **fields,
    }


def grouped(c: SourceConfig, layers: list[bool] | None, shared: int | None, experts: int) -> dict[str, Any]:
    """The mixture of DeepSeek-V3 and its relatives: sigmoids, groups, a correction of the choice, shared experts."""
    return mixture(
        c,
        c.moe_intermediate_size,
        layers,
        num_experts=experts,
        router_scores="sigmoid",
        router_renormalise=c.norm_topk_prob,
        router_scale=c.routed_scaling_factor,
        router_correction=True,
        router_groups=c.n_group,
        router_groups_kept=c.topk_group,
        shared_expert_intermediate_size=c.moe_intermediate_size * shared if shared else None,
    )


def after(c: SourceConfig, dense: int) -> list[bool]:
    """A mixture in all layers but the first `dense`."""
    return [i >= dense for i in range(c.num_hidden_layers)]


def sparse(c: SourceConfig) -> list[bool]:
    """Where Qwen's models have mixtures."""
    dense = set(c.mlp_only_layers or ())
    return [i not in dense and (i + 1) % c.decoder_sparse_step == 0 for i in range(c.num_hidden_layers)]


def marked(c: SourceConfig) -> list[bool]:
    """Where `mlp_layer_types` has mixtures."""
    return [kind == "sparse" for kind in c.mlp_layer_types]


def mixtral(c: SourceConfig) -> dict[str, Any]:
    _ = c.num_local_experts
    layer = llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=False, **one_window(c))
    return {**layer, **mixture(c, c.intermediate_size)}


def qwen2_moe(c: SourceConfig) -> dict[str, Any]:
    bias = c.qkv_bias
    fields = {"query_bias": bias, "key_bias": bias, "value_bias": bias}
    experts = mixture(
        c,
        c.moe_intermediate_size,
        sparse(c),
        router_renormalise=c.norm_topk_prob,
        shared_expert_intermediate_size=c.shared_expert_intermediate_size,
        shared_expert_gate=True,
    )
    return {**qwen2(c), **fields, **experts}


def qwen3_moe(c: SourceConfig) -> dict[str, Any]:
    _ = c.use_sliding_window, getattr(c, "max_window_layers", None)  # settled in sliding_window
    bias = c.attention_bias
    layer = llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, qk_norm="head", **one_window(c))
    return {**layer, **mixture(c, c.moe_intermediate_size, sparse(c), router_renormalise=c.norm_topk_prob)}


def olmoe(c: SourceConfig) -> dict[str, Any]:
    c.require("clip_qkv", None, "the class clips normalised queries and keys")
    bias = c.attention_bias
    layer = llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, qk_norm="joint")
    return {**layer, **mixture(c, c.intermediate_size, router_renormalise=c.norm_topk_prob)}


def flex_olmo(c: SourceConfig) -> dict[str, Any]:
    return {**olmo2(c), **mixture(c, c.intermediate_size, router_renormalise=c.norm_topk_prob)}


def dots1(c: SourceConfig) -> dict[str, Any]:
    _ = c.max_window_layers  # settled in layer_types
    bias = c.attention_bias
    layer = llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, qk_norm="head", **windows(c))
    return {**layer, **grouped(c, after(c, c.first_k_dense_replace), c.n_shared_experts, c.n_routed_experts)}


def glm4_moe(c: SourceConfig) -> dict[str, Any]:
    norm = "head" if c.use_qk_norm else None
    layer = llama_layer(
        c, qkv_bias=c.attention_bias, output_bias=False, mlp_bias=False, qk_norm=norm, **rope(c, partial=True)
    )
    return {**layer, **grouped(c, after(c, c.first_k_dense_replace), c.n_shared_experts, c.n_routed_experts)}


def solar_open(c: SourceConfig) -> dict[str, Any]:
    _ = getattr(c, "intermediate_size", None)  # of dense layers, which there are none of
    layer = llama_layer(
        c, qkv_bias=c.attention_bias, output_bias=False, mlp_bias=False, **rope(c, partial=True),
        intermediate_size=c.moe_intermediate_size,
    )  # fmt: skip
    return {**layer, **grouped(c, None, c.n_shared_experts, c.n_routed_experts)}


def exaone_moe(c: SourceConfig) -> dict[str, Any]:
    _ = c.sliding_window_pattern, c.first_k_dense_replace  # settled in layer_types and mlp_layer_types
    layer = llama_layer(
        c, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="head", rope_layers=rotated(c), **windows(c)
    )
    return {**layer, **grouped(c, marked(c), c.num_shared_experts, c.num_experts)}


def ernie4_5_moe(c: SourceConfig) -> dict[str, Any]:
    c.require("use_bias", False, "the class of transformers has no biases of experts")
    last = c.moe_layer_end_index
    last = c.num_hidden_layers - 1 if last == -1 else last
    layers = [
        (i + 1) % c.moe_layer_interval == 0 and c.moe_layer_start_index <= i <= last
        for i in range(c.num_hidden_layers)
    ]
    _ = c.moe_norm_min  # smaller than any sum of softmax scores
    shared = c.moe_intermediate_size * c.moe_num_shared_experts or None
    experts = mixture(
        c, c.moe_intermediate_size, layers, router_correction=True, shared_expert_intermediate_size=shared
    )
    return {**llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=False), **experts}


def hunyuan_v1_moe(c: SourceConfig) -> dict[str, Any]:
    return {**hunyuan(c), **mixture(c, c.intermediate_size, shared_expert_intermediate_size=c.intermediate_size)}


def minimax_m2(c: SourceConfig) -> dict[str, Any]:
    layer = llama_layer(c, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="joint", **rope(c, partial=True))
    return {**layer, **mixture(c, c.intermediate_size, router_scores="sigmoid", router_correction=True)}


def mellum(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    layer = llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, qk_norm="head", **windows(c))
    return {**layer, **mixture(c, c.moe_intermediate_size, marked(c), router_renormalise=c.norm_topk_prob)}


def hy_v3(c: SourceConfig) -> dict[str, Any]:
    bias = c.attention_bias
    _ = c.enable_moe_fp32_combine  # the precision of one sum
    layer = llama_layer(c, qkv_bias=bias, output_bias=bias, mlp_bias=False, qk_norm="head")
    experts = mixture(
        c,
        c.moe_intermediate_size,
        marked(c),
        router_scores="sigmoid",
        router_correction=True,
        router_scale=c.router_scaling_factor,
        shared_expert_intermediate_size=c.moe_intermediate_size * c.num_shared_experts or None,
    )
    return {**layer, **experts}


def cohere2_moe(c: SourceConfig) -> dict[str, Any]:
    _ = c.sliding_window_pattern  # settled in layer_types
    _ = c.norm_topk_prob, c.shared_expert_combination_strategy  # of sigmoids, and of shared experts
    c.require("expert_selection_fn", "softmax", "sigmoids of chosen logits are not supported")
    c.require("num_shared_experts", 0, "an average with shared experts is not supported")
    mixtures = marked(c)
    forced = c.prefix_dense_sliding_window_pattern == 1
    rope_layers = [
        kind == "sliding_attention" or (forced and not mixed) for kind, mixed in zip(c.layer_types, mixtures)
    ]
    rms = getattr(c, "rms_norm_eps", None)
    norms = {"norm_type": "rms_norm" if rms is not None else "layer_norm", "norm_bias": False}
    bias = c.attention_bias
    layer = llama_layer(
        c,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        norm_eps=c.layer_norm_eps if rms is None else rms,
        intermediate_size=c.prefix_dense_intermediate_size or c.intermediate_size,
        residual="parallel_shared_norm",
        logit_scale=c.logit_scale,
        rope_layers=rope_layers,
        **norms,
        **windows(c),
    )
    return {**layer, **mixture(c, c.intermediate_size, mixtures)}


def granite_mixture(c: SourceConfig) -> dict[str, Any]:
    shared = getattr(c, "shared_intermediate_size", None) or None
    return mixture(c, c.intermediate_size, num_experts=c.num_local_experts, shared_expert_intermediate_size=shared)


def granitemoe(c: SourceConfig) -> dict[str, Any]:
    return {**granite(c), **granite_mixture(c)}


def granitemoe_swa(c: SourceConfig) -> dict[str, Any]:
    return {**granite_swa(c), **granite_mixture(c)}


MLP = "layers.{}.mlp."
NAMES = ("gate", "up", "down")
EXPERTS = f"{MLP}experts"


def expert_rules(inputs: str = f"{EXPERTS}.gate_up_proj", outputs: str = f"{EXPERTS}.down_proj") -> tuple[Rule, Rule]:
    """The rules of tensors that hold all experts: gates and inputs, and outputs."""
    return Rule(inputs, (f"{EXPERTS}.gate_up_proj",)), Rule(outputs, (f"{EXPERTS}.down_proj",))


def one_by_one(module: str = EXPERTS, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Stacked:
    """Experts that are stored one by one, with the names of their projections."""
    gate, up, down = (f"{name}.weight" for name in names)
    return Stacked(module, {"gate_up_proj": (gate, up), "down_proj": (down,)})


def router_rules(gate: str = f"{MLP}gate", shared: str | None = None, correction: str | None = None):
    rules = list(renamed((gate, f"{MLP}router")))
    if shared is not None:
        rules += renamed(*((f"{MLP}{shared}.{name}_proj", f"{MLP}shared.{name}_proj") for name in NAMES))
    if correction is not None:
        rules.append(Rule(correction, (f"{MLP}router_correction",)))
    return tuple(rules)


SPARSE = "layers.{}.block_sparse_moe."
SPARSE_EXPERTS = expert_rules(f"{SPARSE}experts.gate_up_proj", f"{SPARSE}experts.down_proj")
MIXTRAL = one_by_one(f"{SPARSE}experts", ("w1", "w3", "w2"))
MIXTRAL_RULES = (*SPARSE_EXPERTS, *router_rules(f"{SPARSE}gate"))
QWEN_RULES = (*expert_rules(), *router_rules(shared="shared_expert"))
GROUPED_RULES = (
    *expert_rules(),
    *router_rules(shared="shared_experts", correction=f"{MLP}gate.e_score_correction_bias"),
)
ERNIE_RULES = (
    *INTERLEAVED_LLAMA_RULES,
    *expert_rules(),
    *router_rules(shared="shared_experts"),
    Rule(f"{MLP}moe_statics.e_score_correction_bias", (f"{MLP}router_correction",), Flatten()),
)
JOINT = head_norms(shared=False)


GRANITE_RULES = (
    *LLAMA_RULES,
    *expert_rules(f"{SPARSE}input_linear.weight", f"{SPARSE}output_linear.weight"),
    *renamed((f"{SPARSE}router.layer", f"{MLP}router")),
)
_GRANITE_SHARED = (
    *module_rules(
        "layers.{}.shared_mlp.input_linear", f"{MLP}shared.gate_proj", f"{MLP}shared.up_proj", operation=SplitGateUp()
    ),
    *renamed(("layers.{}.shared_mlp.output_linear", f"{MLP}shared.down_proj")),
)
SHARED_GRANITE_RULES = (*GRANITE_RULES, *_GRANITE_SHARED)
SWA_GRANITE_RULES = (
    *LLAMA_RULES,
    *_GRANITE_SHARED,
    *SPARSE_EXPERTS,
    *renamed((f"{SPARSE}router", f"{MLP}router")),
    SINKS,
)


ONE_BY_ONE = one_by_one()


def one_mixture(
    config: Any,
    rules: tuple[Rule, ...],
    inert: frozenset[str] = frozenset(),
    stacked: tuple[Stacked, ...] = (ONE_BY_ONE,),
    **fields: Any,
) -> Family:
    """`stacked`: how experts are stored one by one; empty if they are stored together."""
    # The heads of the class of transformers are in `native_only.py`.
    return _family(config, rules, inert | ROUTING, native=None, stacked=stacked, **fields)


FAMILIES: dict[str, Family] = {
    "cohere2_moe": one_mixture(cohere2_moe, (*INTERLEAVED_LLAMA_RULES, *expert_rules(), *router_rules())),
    "granitemoe": one_mixture(granitemoe, GRANITE_RULES, stacked=()),
    "granitemoe_swa": one_mixture(granitemoe_swa, SWA_GRANITE_RULES, stacked=()),
    "granitemoeshared": one_mixture(granitemoe, SHARED_GRANITE_RULES, stacked=()),
    "hy_v3": one_mixture(
        hy_v3,
        (
            *LLAMA_RULES,
            *head_norms(),
            *expert_rules(),
            *router_rules(f"{MLP}router.gate", shared="shared_mlp", correction=f"{MLP}expert_bias"),
        ),
    ),
    "mellum": one_mixture(
        mellum,
        (*LLAMA_RULES, *head_norms(), *expert_rules(), *router_rules()),
        frozenset({"mtp_layer_types", "mtp_mlp_layer_types"}),
    ),
    "dots1": one_mixture(dots1, (*LLAMA_RULES, *head_norms(), *GROUPED_RULES)),
    "ernie4_5_moe": one_mixture(ernie4_5_moe, ERNIE_RULES),
    "exaone_moe": one_mixture(
        exaone_moe,
        (
            *LLAMA_RULES,
            *head_norms(),
            *expert_rules(),
            *router_rules(shared="shared_experts", correction=f"{MLP}e_score_correction_bias"),
        ),
    ),
    "flex_olmo": one_mixture(flex_olmo, (*OLMO2_RULES, *expert_rules(), *router_rules())),
    "glm4_moe": one_mixture(glm4_moe, (*LLAMA_RULES, *head_norms(), *GROUPED_RULES)),
    "hunyuan_v1_moe": one_mixture(
        hunyuan_v1_moe,
        (
            *LLAMA_RULES,
            *head_norms(names=("query_layernorm", "key_layernorm")),
            *expert_rules(),
            *router_rules(f"{MLP}gate.wg", shared="shared_mlp"),
        ),
        frozenset({"eod_token_id", "sep_token_id", "pretraining_tp"}),
    ),
    "minimax_m2": one_mixture(
        minimax_m2,
        (*LLAMA_RULES, *JOINT, *MIXTRAL_RULES, Rule(f"{SPARSE}e_score_correction_bias", (f"{MLP}router_correction",))),
        stacked=(MIXTRAL,),
    ),
    "mixtral": one_mixture(mixtral, (*LLAMA_RULES, *MIXTRAL_RULES), stacked=(MIXTRAL,)),
    "olmoe": one_mixture(olmoe, (*LLAMA_RULES, *JOINT, *expert_rules(), *router_rules())),
    "qwen2_moe": one_mixture(
        qwen2_moe,
        (*LLAMA_RULES, *QWEN_RULES, *renamed((f"{MLP}shared_expert_gate", f"{MLP}shared_gate"))),
    ),
    "qwen3_moe": one_mixture(qwen3_moe, (*LLAMA_RULES, *head_norms(), *expert_rules(), *router_rules())),
    "solar_open": one_mixture(solar_open, (*LLAMA_RULES, *GROUPED_RULES)),
}
