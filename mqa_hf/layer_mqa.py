"""A layer of the canonical model: attention over shared heads, MLP, and the order of the residual stream.

B batch, T tokens, S tokens attended to, H query heads, G key/value heads, D query/key head width, Dv value head
width, d hidden size
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mqa import HeadNorm, eager_attention_forward, project
from .compat_mqa import cache_name
from .configuration_mqa import MQAConfig, of_layer
from .experts_mqa import MQAMLP, MQAMixture
from .latent_mqa import MQALatentAttention, QueryMap
from .positions_mqa import rotate, rotated_components

CACHE = cache_name()


def make_norm(config: MQAConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, config.norm_affine, config.norm_bias)


def scaled_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """The logits [..., vocab_size] of a model, from those of its head."""
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    return logits if config.logit_softcap is None else (logits / config.logit_softcap).tanh() * config.logit_softcap


class MQAAttention(nn.Module):
    """Attention of H query heads over G shared key/value heads (G = 1: multi-query, arXiv 1911.02150).

    With `cross`, keys and values come from an encoder's output; a cache keeps them after the first step.
    """

    rotated: torch.Tensor | None

    def __init__(self, config: MQAConfig, layer_idx: int, cross: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.qk_head_dim = of_layer(config.cross_qk_head_dim if cross else config.qk_head_dim, layer_idx)
        self.v_head_dim = of_layer(config.cross_v_head_dim if cross else config.v_head_dim, layer_idx)
        self.cross = cross
        d, H = config.hidden_size, config.num_attention_heads
        G = config.cross_num_key_value_heads if cross else config.num_key_value_heads
        assert G is not None
        self.num_key_value_groups = H // G
        self.scaling = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.causal and not cross
        self.rotary = config.rope_layers[layer_idx] and not cross
        sliding = config.layer_types[layer_idx] == "sliding_attention" and not cross
        self.sliding_window = config.sliding_window if sliding else None
        chosen = self.rotary and config.layer_frequencies(layer_idx) is not None
        self.register_buffer("rotated", rotated_components(config, layer_idx) if chosen else None, persistent=False)
        self.rotated_width = self.head_dim if config.rope_frequencies is None else self.qk_head_dim
        mapped = config.query_maps and not cross
        self.query_width = self.head_dim if mapped else self.qk_head_dim  # before the map
        self.q_proj = nn.Linear(d, H * self.query_width, bias=config.query_bias)
        self.k_proj = nn.Linear(d, G * self.qk_head_dim, bias=config.key_bias)
        self.v_proj = nn.Linear(d, G * self.v_head_dim, bias=config.value_bias)
        self.o_proj = nn.Linear(H * self.v_head_dim, d, bias=of_layer(config.output_bias, layer_idx))
        gated = config.attention_gate and not cross
        self.gate_proj = nn.Linear(d, H * self.v_head_dim, bias=False) if gated else None
        self.clip = None if cross else config.clip_qkv
        normed = config.qk_norm is not None and not cross
        self.q_norm = HeadNorm(config, H, self.query_width) if normed else None
        self.q_map = QueryMap(H, self.query_width, self.qk_head_dim) if mapped else None
        self.k_norm = HeadNorm(config, G, self.qk_head_dim) if normed and not mapped else None
        self.norm_after_rotation = config.qk_norm_after_rotation
        self.softcap = None if cross else config.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks and not cross else None
        # What the attention function gets besides the usual arguments, by the names that transformers' functions take.
        self.capped = {} if self.softcap is None else {"softcap": self.softcap}
        owns_bias = config.position_embedding == "relative" and (config.relative_per_layer or layer_idx == 0)
        self.relative_bias = nn.Embedding(config.relative_buckets, H) if owns_bias and not cross else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args besides those of transformers' attention layers:
        query_scale: [B, 1, T, 1], a factor on the queries.
        """
        B, T, _ = hidden_states.shape
        cache, known = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if self.cross else past_key_values.self_attention_cache
            known = self.cross and past_key_values.is_updated.get(self.layer_idx, False)
        if known and cache is not None:
            query = self.clipped(project(self.q_proj, hidden_states, self.query_width))
            stored: Any = cache.layers[self.layer_idx]  # on another device in an offloaded cache
            key, value = stored.keys.to(query.device), stored.values.to(query.device)
        else:
            states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = map(self.clipped, self.projected(hidden_states, states))
            query, key = self.placed(query, key, position_embeddings)
            if cache is not None and not isinstance(cache, Cache) and CACHE != "cache":
                kwargs["cache"] = cache  # before 5.24, the attention function extends a paged cache
            elif cache is not None:
                # From 5.24 on, a paged cache reads and sets the other arguments of the attention function.
                others = {"kwargs": kwargs} if CACHE == "cache" else {}
                key, value = cache.update(key, value, self.layer_idx, **others)
                if self.cross and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True

        if query_scale is not None:
            query = query * query_scale
        if query.shape[1] != key.shape[1] * self.num_key_value_groups:  # a rank of tensor parallelism has some heads
            self.num_key_value_groups = query.shape[1] // key.shape[1]
        beside = self.capped if self.sinks is None else {**self.capped, "s_aux": self.sinks}
        # vLLM looks for this call in the source of `forward`, and for the name of the cache in its arguments.
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **beside,
            **kwargs,
        )
        output = output.reshape(B, T, -1)
        if self.gate_proj is not None:
            output = output * self.gate_proj(hidden_states).sigmoid()
        return self.o_proj(output), weights

    def projected(self, x: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of `x` [B, T, d], keys and values of `states` [B, S, d], each [B, heads, T or S, width]."""
        return (
            project(self.q_proj, x, self.query_width),
            project(self.k_proj, states, self.qk_head_dim),
            project(self.v_proj, states, self.v_head_dim),
        )

    def clipped(self, x: torch.Tensor) -> torch.Tensor:
        """Projected queries, keys or values, clipped if the model does."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def placed(
        self, query: torch.Tensor, key: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise, map and rotate queries [B, H, T, D] and keys [B, G, T, D]."""
        return self.placed_queries(query, angles), self.placed_keys(key, angles)

    def placed_queries(self, query: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        if self.norm_after_rotation:
            return self.own_queries(self.rotate(query, angles))
        return self.rotate(self.own_queries(query), angles)

    def placed_keys(self, key: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        if self.k_norm is None:
            return self.rotate(key, angles)
        if self.norm_after_rotation:
            return self.k_norm(self.rotate(key, angles))
        return self.rotate(self.k_norm(key), angles)

    def own_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Projected queries [B, H, T, `query_width`] -> [B, H, T, D], before their rotation."""
        query = query if self.q_norm is None else self.q_norm(query)
        return query if self.q_map is None else self.q_map(query)

    def as_computed(self) -> bool:
        """Whether the indices of rotated components, which are not in checkpoints, are set."""
        return (
            self.rotated is None
            or self.rotated.is_meta
            or torch.equal(self.rotated.cpu(), rotated_components(self.config, self.layer_idx))
        )

    def rotate(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Rotate queries or keys [B, heads, T, qk_head_dim], if the layer has rotary positions; `angles` are the
        cosines and sines of all frequencies."""
        if not self.rotary or angles is None:
            return x
        cos, sin = angles
        if self.rotated is not None:
            cos, sin = cos[..., self.rotated], sin[..., self.rotated]
        return rotate(x, cos, sin, self.rotated_width)


Attention = MQAAttention | MQALatentAttention


def make_attention(config: MQAConfig, layer_idx: int, cross: bool = False) -> Attention:
    """Make the attention of a layer: with key/value heads, or with a latent."""
    latent = config.cross_kv_latent_dim if cross else config.kv_latent_dim
    return (MQAAttention if latent is None else MQALatentAttention)(config, layer_idx, cross)


def make_mlp(config: MQAConfig, layer_idx: int) -> "MQAMLP | MQAMixture":
    """Make the MLP of a layer, or its mixture of experts."""
    return MQAMixture(config) if config.expert_layers[layer_idx] else MQAMLP(config)


class MQAHeadTransform(nn.Module):
    """norm(act(dense(x))), before the head."""

    def __init__(self, config: MQAConfig):
        super().__init__()
        assert config.head_transform is not None
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_transform_bias)
        self.act_fn = ACT2FN[config.head_transform]
        self.norm = make_norm(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(x)))


class Residual(NamedTuple):
    """One step of the residual stream: x -> after(x + leave(f(enter(x)))), with one sub-layer f or two in parallel.

    Attributes:
        branches: (enter, f) of each sub-layer; the norm `enter` may be `None`.
        after: the norm of a post-norm layer, or `None`.
        leave: the norm of a sub-layer's output, or `None`.
    """

    branches: tuple[tuple[nn.Module | None, nn.Module], ...]
    after: nn.Module | None = None
    leave: nn.Module | None = None


class MQADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MQAConfig, layer_idx: int):
        super().__init__()
        self.residual = config.residual
        self.residual_multiplier = config.residual_multiplier
        self.hidden_dropout = config.hidden_dropout
        self.self_attn = make_attention(config, layer_idx)
        self.mlp = make_mlp(config, layer_idx)
        if config.residual != "output_norm":
            self.input_layernorm = make_norm(config) if layer_idx or config.first_norm else None
        if config.residual in ("sandwich", "output_norm"):
            self.attention_output_norm = make_norm(config)
            self.mlp_output_norm = make_norm(config)
        if config.cross_num_key_value_heads:
            self.cross_attn = make_attention(config, layer_idx, cross=True)
            self.cross_attn_layernorm = make_norm(config)
        if config.residual not in ("parallel_shared_norm", "output_norm"):
            self.post_attention_layernorm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if module is self.mlp:
                return self.mlp(x)
            if module is self.self_attn:
                own: dict[str, Any] = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
                if key_position_embeddings is not None:
                    own["key_position_embeddings"] = key_position_embeddings
                if query_scale is not None:
                    own["query_scale"] = query_scale
            else:
                own = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
            return module(x, past_key_values=past_key_values, **own, **kwargs)[0]

        x = hidden_states
        for branches, after, leave in self.residuals(cross=encoder_hidden_states is not None):
            normed, known, outputs = x, None, []
            for norm, module in branches:
                if norm is None or norm is not known:  # a shared norm is computed once
                    normed, known = x if norm is None else norm(x), norm
                output = run(module, normed)
                outputs.append(self.added(output if leave is None else leave(output)))
            for output in outputs:
                x = x + output
            x = x if after is None else after(x)
        return x

    def residuals(self, cross: bool) -> list[Residual]:
        """The order in which sub-layers read the residual stream and add to it.

        Args:
            cross: whether to include cross-attention.
        """
        if self.residual == "parallel_shared_norm":
            return [Residual(((self.input_layernorm, self.self_attn), (self.input_layernorm, self.mlp)))]
        if self.residual == "output_norm":
            return [
                Residual(((None, self.self_attn),), leave=self.attention_output_norm),
                Residual(((None, self.mlp),), leave=self.mlp_output_norm),
            ]
        attention, mlp = (self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)
        if self.residual == "parallel":
            return [Residual((attention, mlp))]
        if self.residual == "sandwich":
            return [
                Residual((attention,), leave=self.attention_output_norm),
                Residual((mlp,), leave=self.mlp_output_norm),
            ]
        branches = [attention, *([(self.cross_attn_layernorm, self.cross_attn)] if cross else []), mlp]
        if self.residual == "post_norm":
            return [Residual(((None, module),), after=norm) for norm, module in branches]
        return [Residual((branch,)) for branch in branches]

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What a sub-layer with this output adds to the residual stream, after dropout and scaling."""
        if self.residual_multiplier != 1.0:
            x = x * self.residual_multiplier
        return nn.functional.dropout(x, self.hidden_dropout, True) if self.training and self.hidden_dropout else x
