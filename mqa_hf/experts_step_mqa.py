"""Mixtures of experts in a decode step.

B rows decoded, d hidden size
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .experts_mqa import MQAExperts, MQAMixture
from .kernel_experts_mqa import MAX_PAIRS, chosen_experts, route
from .kernel_norm_mqa import ACTIVATIONS
from .weights_mqa import plain as is_plain

if TYPE_CHECKING:
    from .step_mqa import DecodeStep


def by_kernel(step: "DecodeStep", mixture: MQAMixture) -> bool:
    """Whether kernels choose and compute the experts: not with adapters or quantised weights."""
    experts = mixture.experts
    plain = type(experts) is MQAExperts and all(
        type(weight) is nn.Parameter and weight.dtype == step.dtype and weight.is_contiguous()
        for weight in (experts.gate_up_proj, experts.down_proj)
    )
    plain = plain and is_plain(mixture.router) and mixture.router.bias is None
    few = step.request.rows * mixture.top_k <= MAX_PAIRS
    return step.triton and plain and few and step.config.hidden_act in ACTIVATIONS


def mixture(step: "DecodeStep", module: MQAMixture, x: torch.Tensor) -> torch.Tensor:
    """The output of a mixture for the rows x [B, d] of a step, [B, d]."""
    if not by_kernel(step, module):
        return module(x)
    weights, chosen = route(
        x, module.router.weight, module.top_k, sigmoid=module.scores == "sigmoid",
        correction=module.router_correction, renormalise=module.renormalise, scale=module.scale,
        groups=module.groups, groups_kept=module.groups_kept,
    )  # fmt: skip
    experts, shared = module.experts, module.shared
    out = chosen_experts(x, experts.gate_up_proj, experts.down_proj, chosen, weights, step.config.hidden_act)
    if shared is None:
        return out
    every = step.linear(step.inner(shared, x, None), (shared.down_proj,))
    return out + (every if module.shared_gate is None else module.shared_gate(x).sigmoid() * every)
