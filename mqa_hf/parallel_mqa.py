"""How transformers divides a stack among the ranks of tensor and pipeline parallelism, and what a decode step needs to
know of it.

B rows decoded, N outputs of a projection on this rank, H query heads, G key/value heads
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .configuration_checks_mqa import BIAS_POSITIONS

STYLES = {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}  # that a decode step knows
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


def divided(weight: Any) -> bool:
    """Whether a weight is divided among the ranks of tensor parallelism, along one dimension."""
    if not isinstance(weight, torch.Tensor) or len(getattr(weight, "placements", ())) != 1:
        return False
    own: Any = weight
    return type(own._local_tensor) in (torch.Tensor, nn.Parameter)  # not quantised


def local(weight: Any) -> Any:
    """This rank's part of a weight, with the storage that the weight has; the weight itself if it is not divided."""
    return weight._local_tensor if divided(weight) else weight


def summed_over(weight: Any) -> Any:
    """The ranks among which the inputs of a projection are divided, if they are."""
    return weight.device_mesh.get_group() if divided(weight) and weight.placements[0].is_shard(1) else None


def gathered(x: torch.Tensor, weight: Any, size: int) -> torch.Tensor:
    """The outputs [B, `size`] of a projection whose outputs `x` [B, N] are divided as the rows of `weight` are."""
    if x.shape[-1] == size or not divided(weight):
        return x
    ranks = weight.device_mesh.get_group()
    most = -(-size // weight.device_mesh.size())  # rows of the first ranks; the last ones may have fewer
    part = nn.functional.pad(x, (0, most - x.shape[-1])).contiguous()
    parts = [torch.empty_like(part) for _ in range(weight.device_mesh.size())]
    dist.all_gather(parts, part, group=ranks)
    return torch.cat(parts, dim=-1)[:, :size]


def forward_of_rank(module: nn.Module) -> bool:
    """Whether `forward` was replaced by transformers, to divide the module among ranks."""
    name = getattr(vars(module).get("forward"), "__qualname__", "")
    return name.endswith("install_forward.<locals>.tp_forward")


def config_of_rank(stack: Any) -> Any:
    """The configuration of a stack with the number of key/value heads that this rank has."""
    own, layer = copy.copy(stack.config), stack.layers[0]
    for name, part in (("num_key_value_heads", "self_attn"), ("cross_num_key_value_heads", "cross_attn")):
        projection = getattr(getattr(layer, part, None), "v_proj", None)
        weight: Any = getattr(projection, "weight", None)
        if divided(weight):
            setattr(own, name, getattr(own, name) // weight.device_mesh.size())
    return own
