"""What vLLM has to know of a checkpoint before it makes the model: heads of the cache and their widths, by layer."""

import copy
from typing import Any

from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from mqa_hf.configuration_checks_mqa import BIAS_POSITIONS
from mqa_hf.configuration_mqa import MQAConfig, of_layer

BY_LAYER = ("qk_head_dim", "v_head_dim", "kv_latent_dim")
CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of the attention kernels of vLLM's CPU build


def cached_width(config: MQAConfig, layer: int) -> int:
    """Width of a layer's cached keys and values, which vLLM stores with the same width.

    A latent is cached as its rotated keys of `qk_head_dim` components and, as the value, the latent itself.
    Where keys have components without rotation, the latent follows the rotated ones.

    Raises:
        ValueError: if vLLM has no kernel for this width.
    """
    latent = of_layer(config.kv_latent_dim, layer) if config.kv_latent_dim is not None else None
    turned = config.rope_layers[layer]
    if latent is None:
        width = max(of_layer(config.qk_head_dim, layer), of_layer(config.v_head_dim, layer))
    else:
        rebuilt = of_layer(config.qk_head_dim, layer) if turned else 0
        plain = not turned or config.rotary_dim < config.head_dim
        width = max(rebuilt + (latent if plain else 0), latent)
    if not current_platform.is_cpu():
        return -(-width // 16) * 16
    found = next((w for w in CPU_WIDTHS if w >= width), None)
    if found is None:
        raise ValueError(
            f"vLLM's CPU build has no attention kernel for a cache of width {width} (layer {layer}); the widest is "
            f"{CPU_WIDTHS[-1]}"
        )
    return found


def refuse_unsupported(config: MQAConfig) -> None:
    """Raise ValueError for a model that vLLM would compute wrongly."""
    reasons = {
        f"{config.position_embedding} positions, a bias on the attention logits": config.position_embedding
        in BIAS_POSITIONS,
        "rotary frequencies that depend on the length of the text": config.rope_by_length,
        "projected embeddings": config.embedding_size != config.hidden_size,
        "latents in 8 or 4 bits": config.latent and config.kv_latent_bits < 16,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"mqa-hf's vLLM plugin does not support {', '.join(found)}; use generate()")


class Shapes(ModelArchConfigConvertorBase):
    """Heads and widths of [`MQAConfig`]; layers of different widths have a configuration each."""

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]] | None:
        config = self.hf_text_config
        refuse_unsupported(config)
        layers = range(config.num_hidden_layers)
        if len({cached_width(config, i) for i in layers}) == 1:
            return None
        each = []
        for i in layers:
            one = copy.copy(config)
            one.cached_width = cached_width(config, i)
            each.append((one, one))
        return each

    def get_head_size(self) -> int:
        config = self.hf_text_config
        own = getattr(config, "cached_width", None)
        return own or max(cached_width(config, i) for i in range(config.num_hidden_layers))

    def get_total_num_kv_heads(self) -> int:
        return 1 if self.hf_text_config.kv_latent_dim is not None else self.hf_text_config.num_key_value_heads


class EncoderDecoderShapes(ModelArchConfigConvertorBase):
    def convert(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "mqa-hf's vLLM plugin runs decoder-only models; serve an encoder-decoder model with transformers"
        )
