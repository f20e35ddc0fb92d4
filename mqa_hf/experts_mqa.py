"""A mixture of experts in place of the MLP: a router picks a few experts per token, beside an expert that all share.

N tokens, d hidden size, E experts, k experts per token
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from .configuration_mqa import MQAConfig

LIMITED_SLOPE = 1.702  # of the sigmoid in gpt-oss's gated unit


class XIELU(nn.Module):
    """Activation with learned curvatures of the positive and the negative side (arXiv 2411.13010; Apertus).

    `beta` and `eps` are constants, which checkpoints of Apertus have, rounded to the type of their weights.
    """

    beta: torch.Tensor
    eps: torch.Tensor
    CONSTANTS = {"beta": 0.5, "eps": -1e-6}

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.zeros(1))
        self.alpha_n = nn.Parameter(torch.zeros(1))
        for name, value in self.CONSTANTS.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = nn.functional.softplus(self.alpha_p) * x * x
        negative = (self.beta + nn.functional.softplus(self.alpha_n)) * (torch.expm1(torch.min(x, self.eps)) - x)
        return torch.where(x > 0, positive, negative) + self.beta * x


class MQAMLP(nn.Module):
    """Up, activation (times gate), down; `width` is that of the inner layer."""

    def __init__(self, config: MQAConfig, width: int | None = None):
        super().__init__()
        d, f = config.hidden_size, width or config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.act_fn = XIELU() if config.hidden_act == "xielu" else ACT2FN[config.hidden_act]
        self.dropout = config.activation_dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.inner(x)
        if self.training and self.dropout:
            inner = nn.functional.dropout(inner, self.dropout)
        return self.down_proj(inner)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., width]."""
        if self.gate_proj is None:
            return self.act_fn(self.up_proj(x))
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)


@use_experts_implementation
class MQAExperts(nn.Module):
    """The gated MLPs of E experts, in the layout of transformers' kernels: `gate_up_proj` [E, 2 f, d], rows of gates
    first, `down_proj` [E, d, f], and their biases [E, 2 f] and [E, d], if any. transformers' `experts_implementation`
    chooses how they are computed."""

    has_bias: bool

    def __init__(self, config: MQAConfig):
        super().__init__()
        assert config.num_experts is not None
        assert config.expert_intermediate_size is not None
        E, d, f = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, f))
        biased = config.expert_bias
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, 2 * f)) if biased else None
        self.down_proj_bias = nn.Parameter(torch.zeros(E, d)) if biased else None
        self.act_fn, self.limit = ACT2FN[config.hidden_act], config.expert_limit

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [N, d], chosen experts [N, k] and their weights [N, k] -> [N, d]; one expert at a time."""
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, place = (chosen == e).nonzero(as_tuple=True)
            inner, outer = (None if b is None else b[e] for b in (self.gate_up_proj_bias, self.down_proj_bias))
            y = self._apply_gate(nn.functional.linear(x[token], self.gate_up_proj[e], inner))
            y = nn.functional.linear(y, self.down_proj[e], outer)
            out.index_add_(0, token, y * weights[token, place, None])
        return out

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[N, 2 f] -> [N, f]; transformers' kernels call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.limit is None:
            return self.act_fn(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * (LIMITED_SLOPE * gate).sigmoid() * (up + 1.0)


class MQARouter(nn.Module):
    """The logits of E experts, in float32 or higher; `weight` [E, d], `bias` [E]."""

    def __init__(self, config: MQAConfig):
        super().__init__()
        assert config.num_experts is not None
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(precise)
        return nn.functional.linear(x.to(precise), self.weight.to(precise), bias)


class MQAMixture(nn.Module):
    """Σ_e w_e expert_e(x) over the k experts of the largest scores, plus the shared expert.

    Scores are the softmax or the sigmoids of the router's logits, in float32. `router_correction` is added to them, or
    to the logits, for the choice alone (DeepSeek-V3, arXiv 2412.19437). With groups, only experts of the groups with
    the largest sums of their two best scores are chosen from. With the scores "sparsemixer", the weight of an expert
    is a softmax over itself and the experts behind it whose logits are close (arXiv 2409.12136; PhiMoE); its sampling
    in training is left out.
    """

    def __init__(self, config: MQAConfig):
        super().__init__()
        assert config.num_experts is not None
        self.top_k, self.scores = config.num_experts_per_tok, config.router_scores
        self.renormalise, self.scale = config.router_renormalise, config.router_scale
        self.groups, self.groups_kept = config.router_groups, config.router_groups_kept
        self.choice, self.gap = config.router_choice, 2.0 * config.router_jitter
        self.router = MQARouter(config)
        self.router_correction = (
            nn.Parameter(torch.zeros(config.num_experts), requires_grad=False) if config.router_correction else None
        )
        self.experts = MQAExperts(config)
        self.experts.has_bias = config.expert_bias  # transformers' decorator sets one value for the class
        shared = config.shared_expert_intermediate_size
        self.shared = MQAMLP(config, shared) if shared else None
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(flat)
        out = self.experts(flat, chosen, weights)
        out = out if self.shared is None else self.with_shared(flat, out, self.shared(flat))
        return out.view(x.shape)

    def with_shared(self, x: torch.Tensor, routed: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """The outputs [N, d] of the chosen experts and of the shared one together, for x [N, d]."""
        return routed + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, d] -> the weights [N, k] and the numbers [N, k] of the chosen experts."""
        logits = self.router(x)
        if self.scores == "sparsemixer":
            return self.route_sparsely(logits, x.dtype)
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        choice = scores if self.choice == "scores" else logits
        choice = choice if self.router_correction is None else choice + self.router_correction.to(scores.dtype)
        if self.groups_kept < self.groups:
            by_group = choice.unflatten(-1, (self.groups, -1))
            best = by_group.topk(2, dim=-1)[0].sum(-1).topk(self.groups_kept, dim=-1, sorted=False)[1]
            kept = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, True)
            choice = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        chosen = choice.topk(self.top_k, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return (weights * self.scale).to(x.dtype), chosen

    def route_sparsely(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Same, from logits [N, E], with the scores "sparsemixer"."""
        left, weights, chosen = logits, [], []
        for _ in range(self.top_k):
            best, at = left.max(dim=-1, keepdim=True)
            with torch.no_grad():
                far = (best - logits) / logits.abs().clamp(min=best) > self.gap
            weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, at))
            chosen.append(at)
            left = left.scatter(1, at, float("-inf"))
        return (torch.cat(weights, dim=1) * self.scale).to(dtype), torch.cat(chosen, dim=1)
