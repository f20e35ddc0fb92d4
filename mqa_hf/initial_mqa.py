"""Initial values of parameters and buffers that are not in a checkpoint or of a new model."""

import math

from torch import nn
from transformers import initialization as init

from .attention_mqa import HeadNorm
from .experts_mqa import XIELU, MQAExperts, MQARouter
from .latent_mqa import HeadLinear, MQALatentAttention, QueryMap
from .layer_mqa import MQAAttention
from .positions_mqa import rotated_components

ATTENTIONS = (MQAAttention, MQALatentAttention)


def initialise(module: nn.Module, std: float) -> None:
    """Initialise what transformers does not know, in place.

    Args:
        module: any module of the model.
        std: standard deviation of normal weights.
    """
    if isinstance(module, ATTENTIONS) and module.rotated is not None:  # not in the checkpoint
        init.copy_(module.rotated, rotated_components(module.config, module.layer_idx))
    if isinstance(module, HeadNorm):
        for weight, value in ((module.weight, 1.0), (module.bias, 0.0)):
            if weight is not None:
                init.constant_(weight, value)
    if isinstance(module, XIELU):
        for name, value in module.CONSTANTS.items():
            init.constant_(getattr(module, name), value)
        for weight, alpha in ((module.alpha_p, 0.8), (module.alpha_n, 0.8 - module.CONSTANTS["beta"])):
            init.constant_(weight, math.log(math.expm1(alpha)))
    if isinstance(module, ATTENTIONS) and module.sinks is not None:
        init.normal_(module.sinks, mean=0.0, std=std)
    if isinstance(module, MQAExperts):
        for weight in (module.gate_up_proj, module.down_proj):
            init.normal_(weight, mean=0.0, std=std)
        for bias in (module.gate_up_proj_bias, module.down_proj_bias):
            if bias is not None:
                init.zeros_(bias)
    if isinstance(module, MQARouter) and module.bias is not None:
        init.zeros_(module.bias)
    if isinstance(module, HeadLinear | QueryMap | MQARouter):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, MQALatentAttention) and module.query_factors is not None:
        init.normal_(module.query_factors)
