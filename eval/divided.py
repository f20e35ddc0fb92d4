"""Models that are divided among ranks by transformers' tensor parallelism, for `torchrun -m mqa_hf benchmark`."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.parallel_mqa import tensor_plan


def ranks_of_job() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of_rank(device: str) -> str:
    """The GPU of this process, if it shares the job with others."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and ranks_of_job() > 1 else device


def divided_model(make: Callable[[], Any], ranks: int, device: str | torch.device) -> Any:
    """The model that `make` returns, divided, with random weights; the whole model is never in memory.

    Raises:
        MQAError: if the ranks do not divide its heads, or transformers has no plan for it.
    """
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        whole = make()
    if not whole.tp_plan:
        raise MQAError(f"{whole.config.model_type} has no plan for tensor parallelism")
    config, _, mesh = whole.prepare_distribute_model(DistributedConfig(tp_size=ranks))
    model: Any = whole.maybe_distribute_model(whole, config, mesh)
    model.to_empty(device=device)
    for module in model.modules():  # every value, buffers included, is still to be set
        vars(module).pop("_is_hf_initialized", None)
    for weight in model.parameters():
        vars(weight).pop("_is_hf_initialized", None)
    model.initialize_weights()
    return model


def of_rank(config: MQAConfig, ranks: int, plan: Mapping[str, str] | None = None) -> MQAConfig:
    """The configuration of what one rank reads in a step: its heads, its inner components and its tokens.

    Args:
        plan: how the class that runs is divided. Default: as this package's.
    """
    if ranks == 1:
        return config
    own = copy.copy(config)
    plan = tensor_plan(config) if plan is None else plan
    divided = {
        "num_attention_heads": "layers.*.self_attn.q_proj" in plan,
        "num_key_value_heads": "layers.*.self_attn.k_proj" in plan,
        "intermediate_size": "layers.*.mlp.down_proj" in plan,
        "vocab_size": True,
    }
    for name, holds in divided.items():
        if holds:
            setattr(own, name, getattr(own, name) // ranks)
    return own
