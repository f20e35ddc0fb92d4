"""Model class for vLLM: the canonical stack within vLLM's backend for models of transformers.

n tokens of a step, H query heads and G key/value heads of this rank, W width of a cached head
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from mqa_hf.attention_mqa import OWN, HeadNorm
from mqa_hf.latent_mqa import MQALatentAttention
from mqa_hf.parallel_mqa import tensor_plan

from .vllm_joined import join
from .vllm_shapes import cached_width

NAME = "mqa_vllm"  # of the attention in transformers


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attend to vLLM's cache, whose keys and values are padded to one width.

    Args:
        module: has vLLM's attention as `vllm_attention`.
        query: [1, H, n, D].
        key, value: [1, G, n, D] and [1, G, n, Dv], of the new tokens.

    Returns:
        [1, n, H, Dv].
    """
    own: Any = module.vllm_attention
    n, width = query.shape[2], value.shape[-1]
    q, k, v = (
        nn.functional.pad(x[0].transpose(0, 1), (0, own.head_size - x.shape[-1])).reshape(n, -1)
        for x in (query, key, value)
    )
    out = own.forward(q, k, v).view(1, n, -1, own.head_size)
    return out[..., :width], None


AttentionInterface.register(NAME, attention)
OWN.add(NAME)


class MQAForVLLM(TransformersForCausalLM):
    """A model of `MQAForCausalLM`'s checkpoints; heads of any width, by layer, and latents.

    A latent is cached as the rotated keys that are rebuilt from it, and the latent itself.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        self.lora = vllm_config.lora_config is not None
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, logits = self.text_config, getattr(self, "logits_processor", None)
        if logits is not None and config.logit_softcap is not None:
            # Here the cap follows the scale; in vLLM it comes before it.
            logits.soft_cap = config.logit_softcap / config.logit_scale

    def _patch_config(self) -> None:
        super()._patch_config()
        config = self.text_config
        config._attn_implementation = NAME
        # vLLM replaces the embedding, and its scale with it; the stack applies it to what it is given then.
        config.scale_inputs_embeds = True

    def recursive_replace(self) -> None:
        # vLLM takes the norm of heads for one whose weight all heads share.
        kept = {name: module for name, module in self.model.named_modules() if isinstance(module, HeadNorm)}
        super().recursive_replace()
        for name, module in kept.items():
            self.model.set_submodule(name, module)
        for attention in self.attentions().values():
            if isinstance(attention, MQALatentAttention):
                attention.always_absorbed = True
            if attention.sinks is not None:  # vLLM's attention keeps it before the weights are loaded
                count = attention.sinks.numel() // self.attention_ranks()
                sinks = nn.Parameter(torch.empty(count, device=self.device_config.device), requires_grad=False)
                set_weight_attrs(sinks, {"weight_loader": sharded_weight_loader(0)})
                attention.sinks = sinks
        if self.quant_config is None and not self.lora:  # both replace single layers later
            join(self.model)

    def attention_ranks(self) -> int:
        """Ranks that query heads are divided among; 1 where each computes all of them."""
        divided = "layers.*.self_attn.q_proj" in tensor_plan(self.text_config)
        return get_tensor_model_parallel_world_size() if divided else 1

    def attentions(self) -> dict[str, Any]:
        """The self-attentions of this rank's layers, by name."""
        return {name: module for name, module in self.model.named_modules() if name.endswith(".self_attn")}

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Give each layer vLLM's attention, for which vLLM then allocates a cache."""
        config, ranks = self.text_config, self.attention_ranks()
        if ranks < get_tensor_model_parallel_world_size() and not current_platform.is_cpu():
            raise ValueError(
                "mqa-hf's vLLM plugin: latents, norms of heads and sinks are computed whole on each rank, for which "
                "vLLM's GPU kernels have not been tried; use tensor_parallel_size=1"
            )
        for name, module in self.attentions().items():
            latent = isinstance(module, MQALatentAttention)
            heads = 1 if latent else max(1, config.num_key_value_heads // ranks)
            sinks = {} if module.sinks is None else {"sinks": module.sinks}
            made = Attention(
                num_heads=config.num_attention_heads // ranks,
                head_size=cached_width(config, module.layer_idx),
                scale=module.scaling,
                num_kv_heads=heads,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                logits_soft_cap=module.softcap,
                per_layer_sliding_window=module.sliding_window,
                prefix=maybe_prefix(prefix, f"model.{name}.attn"),
                **sinks,
            )
            (module.absorbed if latent else module).vllm_attention = made

    def create_attention_instances(self) -> dict[int, Attention]:
        """The same in vLLM 0.24, which would pass what this returns to the model."""
        self._create_attention_instances()
        return {}
