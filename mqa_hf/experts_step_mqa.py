"""Mixtures of experts in a decode step.

B rows decoded, d hidden size
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .experts_mqa import MQAExperts, MQAMixture, MQARouter
from .kernel_experts_mqa import MAX_PAIRS, chosen_experts, route
from .kernel_norm_mqa import ACTIVATIONS
from .weights_mqa import plain as is_plain

if TYPE_CHECKING:
    from .step_mqa import DecodeStep


TYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels


def plain_mixture(mixture: MQAMixture) -> bool:
    """Whether router, experts and the gate of the shared expert are unmodified: no adapters, no quantised weights."""
    experts, gate = mixture.experts, mixture.shared_gate
    return (
        type(mixture.router) is MQARouter
        and type(experts) is MQAExperts
        and all(
            weight is None or type(weight) is nn.Parameter
            for weight in (experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias)
        )
        and (gate is None or is_plain(gate))
    )


def by_kernel(step: "DecodeStep", mixture: MQAMixture) -> bool:
    """Whether kernels choose and compute the experts."""
    experts = mixture.experts
    fits = plain_mixture(mixture) and all(
        weight.dtype == step.dtype and weight.is_contiguous() for weight in (experts.gate_up_proj, experts.down_proj)
    )
    few, known = step.request.rows * mixture.top_k <= MAX_PAIRS, step.config.hidden_act in ACTIVATIONS
    return step.triton and fits and few and known and step.dtype in TYPES


def mixture(step: "DecodeStep", module: MQAMixture, x: torch.Tensor) -> torch.Tensor:
    """The output of a mixture for the rows x [B, d] of a step, [B, d]."""
    if not by_kernel(step, module):
        return module(x)
    weights, chosen = route(
        x, module.router.weight, module.top_k, bias=module.router.bias, scores=module.scores, choice=module.choice,
        gap=module.gap, correction=module.router_correction, renormalise=module.renormalise, scale=module.scale,
        groups=module.groups, groups_kept=module.groups_kept,
    )  # fmt: skip
    experts, shared = module.experts, module.shared
    out = chosen_experts(
        x, experts.gate_up_proj, experts.down_proj, chosen, weights, step.config.hidden_act,
        gate_up_bias=experts.gate_up_proj_bias, down_bias=experts.down_proj_bias, limit=experts.limit,
    )  # fmt: skip
    if shared is None:
        return out
    return module.with_shared(x, out, step.linear(step.inner(shared, x, None), (shared.down_proj,)))
