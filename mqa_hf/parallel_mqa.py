"""How transformers divides a stack among the ranks of tensor and pipeline parallelism.

H query heads, G key/value heads
"""

from typing import Any

from .configuration_checks_mqa import BIAS_POSITIONS

PIPELINE = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


def tensor_plan(config: Any) -> dict[str, str]:
    """The plan of a stack, by patterns of module names, as transformers names its styles.

    Query heads are divided. Each rank has the shared key/value head whole; with several, each has some. Attention with
    latents, or with norms, sinks, maps or biases that belong to single heads, runs whole on each rank.
    """
    plan: dict[str, str] = {}
    biased = config.position_embedding in BIAS_POSITIONS  # by query head
    if not (config.latent or config.qk_norm or config.attention_sinks or biased):
        plan |= attention_plan("self_attn", config.num_key_value_heads)
        if config.attention_gate:
            plan["layers.*.self_attn.gate_proj"] = "colwise"
    if config.cross_num_key_value_heads and config.cross_kv_latent_dim is None:
        plan |= attention_plan("cross_attn", config.cross_num_key_value_heads)
    if not all(config.expert_layers):
        plan |= mlp_plan("mlp", config.gated_mlp)
    if any(config.expert_layers):
        plan["layers.*.mlp.experts"] = "moe_tp_experts"
        plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
        plan["layers.*.mlp.experts.down_proj"] = "rowwise"
        if config.expert_bias:  # each rank would add the biases of outputs
            plan = {name: style for name, style in plan.items() if ".experts" not in name}
        if config.shared_expert_intermediate_size:
            plan |= mlp_plan("mlp.shared", config.gated_mlp)
    return plan


def attention_plan(name: str, heads: int) -> dict[str, str]:
    plan = {f"layers.*.{name}.q_proj": "colwise", f"layers.*.{name}.o_proj": "rowwise"}
    if heads > 1:
        plan |= {f"layers.*.{name}.{projection}": "colwise" for projection in ("k_proj", "v_proj")}
    return plan


def mlp_plan(name: str, gated: bool) -> dict[str, str]:
    projections = ("gate_proj", "up_proj") if gated else ("up_proj",)
    return {**{f"layers.*.{name}.{p}": "colwise" for p in projections}, f"layers.*.{name}.down_proj": "rowwise"}
