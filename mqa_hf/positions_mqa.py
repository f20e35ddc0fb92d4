"""Positions: rotary and sinusoidal embeddings, masks, and the biases of ALiBi and relative positions.

B batch, T tokens, S tokens attended to, H query heads, d hidden size, R rotated components of a head
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .compat_mqa import cache_name
from .configuration_checks_mqa import BIAS_POSITIONS
from .configuration_mqa import MQAConfig

CACHE = cache_name()
Mask = torch.Tensor | dict[str, torch.Tensor] | None  # as passed to a model: 2D, 4D, or 4D by layer type
MASKS: dict[tuple[bool, str], Callable] = {
    (True, "full_attention"): create_causal_mask,
    (True, "sliding_attention"): create_sliding_window_causal_mask,
    (False, "full_attention"): create_bidirectional_mask,
    (False, "sliding_attention"): create_bidirectional_sliding_window_mask,
}


def sinusoids(position_ids: torch.Tensor, config: MQAConfig) -> torch.Tensor:
    """[B, T] -> [B, T, d]: sines in the first half, cosines in the second (arXiv 1706.03762, section 3.5).

    In float32, or in float64 if the positions are.
    """
    half = config.hidden_size // 2
    dtype = torch.float64 if position_ids.dtype == torch.float64 else torch.float32
    steps = torch.arange(half, device=position_ids.device, dtype=dtype)
    frequencies = torch.exp(steps * (-math.log(10000.0) / (half - 1 if config.sinusoidal_endpoint else half)))
    angles = (position_ids + config.position_offset).unsqueeze(-1).to(dtype) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rope_init(rope_type: str) -> Callable:
    """The function that computes the frequencies of a rope type."""
    default = MQARotaryEmbedding.compute_default_rope_parameters
    return default if rope_type == "default" else ROPE_INIT_FUNCTIONS[rope_type]


class MQARotaryEmbedding(nn.Module):
    """Cosines and signed sines of the rotary position embedding (arXiv 2104.09864), any of transformers' rope types.

    Returns `cos` and `sin`, each [B, 1, T, R] with R rotated components, for [`rotate`]; the first half of `sin` is
    negated, which saves a negation and a concatenation each time it is used. With parameters by layer type, R counts
    the components of all types, one type after the other (`MQAConfig.layer_frequencies`).
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: MQAConfig):
        super().__init__()
        # After loading on `meta`, transformers recomputes the buffers of modules with this name from these attributes.
        self.config = config
        self.rope_type = "default" if config.rope_by_type else config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.attention_scaling: float | list[float]
        inv_freq, self.attention_scaling = rope_init(self.rope_type)(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MQAConfig, device=None, layer_type: str | None = None, **kwargs
    ) -> tuple[torch.Tensor, float | list[float]]:
        """Frequencies [R / 2], and the factor of their cosines and sines; with parameters by layer type, those of all
        types one after the other, with a factor for each type."""
        if config.rope_by_type and layer_type is None:
            each = [
                rope_init(one["rope_type"])(config, device, layer_type=name)
                for name, one in config.rope_by_type.items()
            ]
            return torch.cat([f for f, _ in each]), [float(scaling) for _, scaling in each]
        parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        dim = config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        scaling: Any = self.attention_scaling
        if isinstance(scaling, list):
            scaling = torch.tensor(scaling, device=angles.device).repeat_interleave(angles.shape[-1] // len(scaling))
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)

    def as_computed(self) -> bool:
        """Whether the frequencies, which are not in checkpoints, are set."""
        held = self.original_inv_freq
        expected = MQARotaryEmbedding(self.config).original_inv_freq.to(held.dtype)  # cast like the model
        return held.is_meta or torch.allclose(held.cpu().float(), expected.float(), rtol=1e-5, atol=0.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotate the first R of every `head_dim` components of x, pairing component j with j + R/2.

    Args:
        x: [B, heads, T, m·head_dim]; each of the m blocks is rotated by the same angles.
        cos, sin: [B, 1, T, R], from [`MQARotaryEmbedding`].
        head_dim: width of a block, at least R.
    """
    R, width = cos.shape[-1], x.shape[-1]
    if width > head_dim:
        x = x.unflatten(-1, (-1, head_dim))
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated, passed = (x, None) if head_dim == R else (x[..., :R], x[..., R:])
    rotated = rotated * cos + rotated.roll(R // 2, -1) * sin
    if passed is not None:
        rotated = torch.cat((rotated, passed), dim=-1)
    return rotated.flatten(-2) if width > head_dim else rotated


def query_scale(positions: torch.Tensor, config: MQAConfig) -> torch.Tensor:
    """The factor on queries at these positions, in float32: 1 + beta · log(1 + ⌊position / length⌋)."""
    assert config.query_scaling_beta is not None
    assert config.query_scaling_length is not None
    return 1.0 + config.query_scaling_beta * torch.log(1.0 + torch.floor(positions / config.query_scaling_length))


def rotated_components(config: MQAConfig, layer: int) -> torch.Tensor:
    """Indices of each rotated component's cosine and sine among those of all frequencies, for one layer."""
    pairs = torch.tensor(config.layer_frequencies(layer), dtype=torch.long)
    return torch.cat((pairs, pairs + config.rotary_dim // 2 * max(1, len(config.rope_by_type))))


def angles_of(
    config: MQAConfig, layer: int, angles: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [..., R] of a rotated layer's own frequencies, from those of all layer types."""
    half, total = config.rotary_dim // 2, angles[0].shape[-1] // 2
    if half == total:
        return angles
    first = config.first_frequency(layer)
    cos, sin = (
        torch.cat((x[..., first : first + half], x[..., total + first : total + first + half]), dim=-1) for x in angles
    )
    return cos, sin


def make_masks(
    config: MQAConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Mask,
    position_ids: torch.Tensor,
    cache: Cache | None,
) -> dict[str, Any]:
    """Make the mask of each layer type, in the form that the attention implementation takes."""
    if isinstance(attention_mask, dict):
        return attention_mask
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE: cache,
    }
    if config.causal:
        arguments["position_ids"] = position_ids
    return {name: MASKS[config.causal, name](**arguments) for name in set(config.layer_types)}


class PositionBias:
    """Returns each layer's mask, with the ALiBi or relative-position bias added.

    Args:
        config: configuration of the stack.
        masks: from [`make_masks`], by layer type.
        attention_mask: as passed to the model.
        x: [B, T, d], for its sizes, type and device.
    """

    def __init__(
        self, config: MQAConfig, masks: dict[str, Any], attention_mask: Mask, x: torch.Tensor, cache: Cache | None
    ):
        self.config, self.masks, self.x = config, masks, x
        self.ready: dict[str, torch.Tensor] = {}
        if config.position_embedding not in BIAS_POSITIONS:
            return
        T, past = x.shape[1], cache.get_seq_length() if cache is not None else 0
        self.queries = torch.arange(T, device=x.device) + past
        self.spans: dict[str, tuple[int, torch.Tensor]] = {}  # by layer type, the keys in its cache
        self.visible: dict[str, torch.Tensor | None] = {}
        for name in set(config.layer_types):
            S, first = (T, 0) if cache is None else cache.get_mask_sizes(T, config.layer_types.index(name))
            self.spans[name] = first, torch.arange(S, device=x.device) + first
            self.visible[name] = self.spans[name][1] <= self.queries[:, None] if config.causal else None
        if config.position_embedding == "alibi":
            self.add_alibi(attention_mask)

    def __call__(self, layer: nn.Module, layer_type: str) -> Any:
        """The mask of a layer; a layer without its own relative bias uses that of the layer before."""
        if self.config.position_embedding not in BIAS_POSITIONS:
            return self.masks[layer_type]
        attention: Any = layer.self_attn
        if attention.relative_bias is not None:
            self.add_relative(attention.relative_bias)
        return self.ready[layer_type]

    def add_alibi(self, attention_mask: Mask) -> None:
        """Linear biases (arXiv 2108.12409)."""
        config, T = self.config, len(self.queries)
        slopes = torch.tensor(config.alibi_slopes, device=self.x.device)[:, None, None]
        counted = None
        if config.positions_from_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            counted = (attention_mask.long().cumsum(1) - 1) * attention_mask.long()
        for name, (first, span) in self.spans.items():
            keys, here = span[None], self.queries[None]
            if counted is not None:
                room = nn.functional.pad(counted, (0, len(span)))
                keys, here = room[:, first : first + len(span)], counted[:, -T:]
            if config.alibi_bfloat16:
                scale = config.attention_scale
                bias = ((slopes / scale).bfloat16() * keys[:, None, None]).float() * scale
            else:
                # Softmax ignores an offset common to a query's keys; small numbers are exact in 16 bits.
                bias = slopes * (keys[:, None, None] - here[:, None, :, None])
            self.ready[name] = add_bias(self.masks[name], bias.to(self.x.dtype), self.visible[name])

    def add_relative(self, table: nn.Embedding) -> None:
        """A learned bias for each bucket of distances."""
        config = self.config
        for name, (_, span) in self.spans.items():
            distance = span - self.queries[:, None]
            bucket = relative_bucket(distance, config.relative_buckets, config.relative_max_distance, config.causal)
            bias = table(bucket.to(table.weight.device)).permute(2, 0, 1)[None]
            self.ready[name] = add_bias(self.masks[name], bias.to(self.x.device, self.x.dtype), self.visible[name])


def relative_bucket(distance: torch.Tensor, buckets: int, max_distance: int, causal: bool) -> torch.Tensor:
    """The bucket of each distance (key position minus query position), as in T5 (arXiv 1910.10683, section 2.1).

    Small distances have one bucket each, larger ones share buckets that widen logarithmically up to `max_distance`.
    Without `causal`, half of the buckets are for keys after the query.
    """
    offset = torch.zeros_like(distance)
    if causal:
        distance = -distance.clamp(max=0)
    else:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, coarse)


def distance_bias(config: MQAConfig, table: nn.Embedding) -> torch.Tensor:
    """The relative bias [H, n] of a key n positions before the query; the last one is for all larger distances."""
    distances = torch.arange(config.relative_max_distance + 1, device=table.weight.device)
    buckets = relative_bucket(-distances, config.relative_buckets, config.relative_max_distance, config.causal)
    return table(buckets).t().float().contiguous()


def add_bias(mask: torch.Tensor | None, bias: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Combine a bias [1, H, T, S] on the attention logits and a mask of any form into an additive mask.

    `visible` [T, S] replaces a mask that was omitted because the attention function applies causality itself.
    """
    if mask is None:
        mask = visible
    if mask is None:
        return bias
    # A row of padding that sees nothing keeps its bias: if a whole row is the lowest number, the backward pass of
    # PyTorch's attention takes each key's weight as 1.
    least = torch.finfo(bias.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask | ~mask.any(-1, keepdim=True), bias, least)
    blind = mask.amax(-1, keepdim=True) <= least / 2
    return torch.where(blind, bias, (mask + bias).clamp(min=least))
