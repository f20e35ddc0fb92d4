"""Attention whose cache holds one latent per token, from which values are computed and keys are rebuilt.

B batch, T tokens, S tokens attended to, H query heads, G heads that the latent replaces, D head width of which R
components are rotated, Dv value head width, d hidden size, r latent width, W key width, C = W / 2

A latent c = Z x + z [r] is computed before rotation. Keys are rebuilt from it as C complex components κ = U c + b,
each with a rotary frequency f, shared by all query heads. Head a combines them with factors that commute with the
rotation, k_aj = Σ_{i: f_i = j} b_ai κ_i. Unrotated components and values are linear maps of c per head. Attention is
computed in one of two ways, with the same result:

- per head: rebuild keys and values of the G heads. This takes the fewest operations if many tokens attend at once;
- absorbed: map each query to the W components and to the latent, and attend to (R_t κ, c) as one key, c as its value.
  Nothing is rebuilt per head (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, does so without rotation).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mqa import HeadNorm, eager_attention_forward, project
from .configuration_mqa import MQAConfig, of_layer
from .packing_mqa import rounded_latent
from .positions_mqa import angles_of, rotate, rotated_components

Angles = tuple[torch.Tensor, torch.Tensor]
AT_ONCE = 2**27  # numbers of latents and their keys that are made at once from a cache


class HeadLinear(nn.Module):
    """A linear map of the latent per head; `weight` [G, N, r]."""

    def __init__(self, heads: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Apply each head's map: [B, S, r] -> [B, G, S, N]."""
        return torch.einsum("bsr,gnr->bgsn", latent, self.weight)

    def absorb(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the transposed maps, so that x can be multiplied with latents: [B, H, T, N] -> [B, H, T, r]."""
        return torch.einsum("bgmtn,gnr->bgmtr", x.unflatten(1, (len(self.weight), -1)), self.weight).flatten(1, 2)

    def read(self, mixed: torch.Tensor) -> torch.Tensor:
        """Apply each query head's map to its own mixture of latents: [B, T, H, r] -> [B, T, H, N]."""
        return torch.einsum("btgmr,gnr->btgmn", mixed.unflatten(2, (len(self.weight), -1)), self.weight).flatten(2, 3)


class QueryMap(nn.Module):
    """A linear map of each head's own queries; `weight` [H, N, r]."""

    def __init__(self, heads: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """[B, H, T, r] -> [B, H, T, N]."""
        return torch.einsum("bhtr,hnr->bhtn", query, self.weight)


class AttentionView(nn.Module):
    """The attributes that attention functions read of the calling module, for one of the two ways to compute."""

    def __init__(self, config: MQAConfig, layer_idx: int, groups: int, is_causal: bool):
        super().__init__()
        self.config, self.layer_idx, self.num_key_value_groups, self.is_causal = config, layer_idx, groups, is_causal


class MQALatentAttention(nn.Module):
    """Attention of H query heads to one latent per token; with `cross`, to latents of the encoder's output."""

    rotated: torch.Tensor | None

    def __init__(self, config: MQAConfig, layer_idx: int, cross: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.cross = cross
        self.head_dim = config.head_dim
        self.v_head_dim = of_layer(config.cross_v_head_dim if cross else config.v_head_dim, layer_idx)
        self.rotary = config.rope_layers[layer_idx] and not cross
        self.qk_head_dim = of_layer(config.qk_head_dim, layer_idx) if self.rotary else 0
        r, G = (
            of_layer(config.cross_kv_latent_dim if cross else config.kv_latent_dim, layer_idx),
            config.kv_latent_heads,
        )
        assert r is not None
        assert G is not None
        self.kv_latent_dim, self.heads, self.bits = r, G, config.kv_latent_bits
        d, H = config.hidden_size, config.num_attention_heads
        self.scaling = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.causal and not cross
        sliding = config.layer_types[layer_idx] == "sliding_attention" and not cross
        self.sliding_window = config.sliding_window if sliding else None
        self.q_proj = nn.Linear(d, H * self.head_dim, bias=config.query_bias)
        self.kv_proj = nn.Linear(d, r)
        W, plain = self.qk_head_dim, self.head_dim - (config.rotary_dim if self.rotary else 0)
        self.register_buffer("rotated", rotated_components(config, layer_idx) if W else None, persistent=False)
        self.k_proj = nn.Linear(r, W) if W else None
        self.query_factors = nn.Parameter(torch.empty(2, G, W // 2)) if W else None
        self.k_up = HeadLinear(G, r, plain) if plain else None
        self.v_up = HeadLinear(G, r, self.v_head_dim)
        self.o_proj = nn.Linear(H * self.v_head_dim, d, bias=of_layer(config.output_bias, layer_idx))
        self.first_frequency = config.first_frequency(layer_idx) if self.rotary else 0
        self.q_norm = HeadNorm(config, H, self.head_dim) if config.qk_norm is not None and not cross else None
        self.softcap = None if cross else config.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks and not cross else None
        self.capped = {} if self.softcap is None else {"softcap": self.softcap}
        self.always_absorbed = False  # where the attention itself holds the cache, of keys and latents
        owns_bias = config.position_embedding == "relative" and (config.relative_per_layer or layer_idx == 0)
        self.relative_bias = nn.Embedding(config.relative_buckets, H) if owns_bias and not cross else None
        self.by_head = AttentionView(config, layer_idx, H // G, self.is_causal)
        self.absorbed = AttentionView(config, layer_idx, H, self.is_causal)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        key_position_embeddings: Angles | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As [`MQAAttention.forward`]; `key_position_embeddings` are those of all tokens, if the cache keeps only
        latents."""
        query = self.queries(hidden_states, position_embeddings)
        query = query if query_scale is None else query * query_scale
        cache, known = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if self.cross else past_key_values.self_attention_cache
            known = self.cross and past_key_values.is_updated.get(self.layer_idx, False)
        if known and cache is not None:
            stored: Any = cache.layers[self.layer_idx]  # on another device in an offloaded cache
            latent = stored.latents() if hasattr(stored, "latents") else stored.keys.to(query.device)
            return self.attend_absorbed(query, None, latent, attention_mask, kwargs)
        made = self.kv_proj(hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        latent = rounded_latent(made, self.bits)
        if cache is not None:
            layers: Any = cache.layers
            stored = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            alone = hasattr(stored, "append_latents")  # without keys
            if alone:
                stored.append_latents(made)
                length = stored.length
            else:
                keys, held = self.keep(latent, cache, position_embeddings)
                length = held.shape[2]
            if self.cross and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
            if length != latent.shape[1]:
                if alone:
                    return self.attend_by_rows(query, stored, key_position_embeddings, attention_mask, kwargs)
                return self.attend_absorbed(query, keys, held, attention_mask, kwargs)
        if self.always_absorbed:
            keys = self.rebuilt(latent, position_embeddings) if self.qk_head_dim else None
            return self.attend_absorbed(query, keys, latent[:, None], attention_mask, kwargs)
        return self.attend_by_head(query, latent, position_embeddings, attention_mask, kwargs)

    def queries(self, x: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """[B, T, d] -> rotated queries [B, H, T, D]."""
        return self.turned(self.normed(project(self.q_proj, x, self.head_dim)), angles)

    def normed(self, query: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] -> the same, normalised if the model does."""
        return query if self.q_norm is None else self.q_norm(query)

    def turned(self, query: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """[B, H, T, D] -> the same, rotated."""
        if not self.rotary:
            return query
        assert angles is not None
        return rotate(query, *self.of_layer_type(angles), self.head_dim)

    def of_layer_type(self, angles: Angles) -> Angles:
        """The angles of this layer's type, from those of all layer types."""
        return angles_of(self.config, self.layer_idx, angles)

    def components(self) -> torch.Tensor:
        """Indices of the query components that the rebuilt ones are multiplied with, [W]."""
        assert self.rotated is not None
        pairs = self.rotated[: self.qk_head_dim // 2] - self.first_frequency
        return torch.cat((pairs, pairs + self.config.rotary_dim // 2))

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, d] -> latents [B, S, r], rounded as in the cache."""
        return rounded_latent(self.kv_proj(x), self.bits)

    def keep(
        self, latent: torch.Tensor, cache: Cache, angles: Angles | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Extend one of transformers' caches, or one that holds keys, by new latents [B, T, r].

        Returns:
            The rotated keys [B, 1, S, W] (`None` without rotation) and the latents [B, 1, S, r] of all cached tokens.
        """
        keys, values = self.as_cached(latent[:, None], angles)
        if isinstance(cache, QuantizedCache) and not self.qk_head_dim:
            values = keys  # an empty tensor cannot be quantised
        keys, held = cache.update(keys, values, self.layer_idx)
        return (keys, held) if self.qk_head_dim else (None, keys)

    def as_cached(self, latent: torch.Tensor, angles: Angles | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for transformers' caches from latents [B, 1, S, r]: rotated keys [B, 1, S, W] and the
        latents; without rotation, the latents and an empty tensor."""
        if not self.qk_head_dim:
            return latent, latent[..., :0]
        return self.rebuilt(latent[:, 0], angles), latent

    def rebuilt(self, latent: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Rebuild keys: latents [B, S, r] -> rotated key components [B, 1, S, W]."""
        assert self.k_proj is not None
        assert angles is not None
        cos, sin = angles
        return rotate(self.k_proj(latent)[:, None], cos[..., self.rotated], sin[..., self.rotated], self.qk_head_dim)

    def attend_by_head(
        self, query: torch.Tensor, latent: torch.Tensor, angles: Angles | None, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the keys and values of the G heads: rotated queries [B, H, T, D], latents [B, S, r]."""
        key = self.keys_by_head(latent, angles)
        output, weights = self.attend(self.by_head, query, key, self.v_up(latent), mask, kwargs)
        return self.o_proj(output.flatten(2)), weights

    def keys_by_head(self, latent: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """Latents [B, S, r] -> rotated keys of the G heads [B, G, S, D]."""
        parts = []
        if self.k_proj is not None:
            assert angles is not None
            rows = nn.functional.linear(self.k_proj(latent), self.head_factors())
            own = self.of_layer_type(angles)
            parts.append(rotate(rows.unflatten(-1, (self.heads, -1)).transpose(1, 2), *own, own[0].shape[-1]))
        if self.k_up is not None:
            parts.append(self.k_up(latent))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def attend_absorbed(
        self, query: torch.Tensor, keys: torch.Tensor | None, latent: torch.Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same result, from queries mapped to the rebuilt keys [B, 1, S, W] and the latents [B, 1, S, r]."""
        wide, plain = self.absorb(query)
        query = torch.cat([part for part in (wide, plain) if part is not None], dim=-1)
        key = latent if keys is None else keys if plain is None else torch.cat((keys, latent), dim=-1)
        output, weights = self.attend(self.absorbed, query, key, latent, mask, kwargs)
        return self.o_proj(self.v_up.read(output).flatten(2)), weights

    def attend_by_rows(
        self, query: torch.Tensor, stored: Any, angles: Angles | None, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to a cache that holds only latents, a few rows at a time: the keys of all rows together can take many
        times the memory of the cache.

        Args:
            query: rotated queries [B, H, T, D].
            stored: the cache's layer, with B rows or a multiple of B.
            angles: of all cached tokens, [B, 1, S, R] each.
        """
        B, size = len(query), stored.length * (self.qk_head_dim + self.kv_latent_dim)
        whole = not (mask is None or isinstance(mask, torch.Tensor))  # a mask in blocks has no rows to select
        rows = B if whole else max(1, AT_ONCE // size)
        outputs: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for first in range(0, B, rows):
            some = slice(first, first + rows)
            latent = stored.latents(query.dtype, B, some)
            keys = None
            if self.rotary:
                assert angles is not None
                keys = self.rebuilt(latent.squeeze(1), (angles[0][some], angles[1][some]))
            seen = mask[some] if isinstance(mask, torch.Tensor) and len(mask) == B else mask
            own = {name: x[some] if name == "position_ids" and len(x) == B else x for name, x in kwargs.items()}
            output, weight = self.attend_absorbed(query[some], keys, latent, seen, own)
            outputs.append(output)
            if weight is not None:
                weights.append(weight)
        return torch.cat(outputs), torch.cat(weights) if weights else None

    def attend(
        self, view: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention(
            view,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **(self.capped if self.sinks is None else {**self.capped, "s_aux": self.sinks}),
            **kwargs,
        )

    def absorb(self, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Map rotated queries [B, H, T, D] to the rebuilt components [B, H, T, W] and to the latent [B, H, T, r].

        The first are conj(b_ac) q_hf(c) for head a = h // (H / G), real parts first. A missing part is `None`.
        """
        wide = plain = None
        R = self.config.rotary_dim if self.rotary else 0
        if self.query_factors is not None:
            real, imaginary = query[..., self.components()].chunk(2, dim=-1)
            groups = query.shape[1] // self.heads
            a, b = self.query_factors.repeat_interleave(groups, dim=1)[:, :, None]
            wide = torch.cat((a * real + b * imaginary, a * imaginary - b * real), dim=-1)
        if self.k_up is not None:
            plain = self.k_up.absorb(query[..., R:])
        return wide, plain

    def head_factors(self) -> torch.Tensor:
        """[G·R, W]: map rebuilt components to each head's rotated ones, k_aj = Σ_{i: f_i = j} b_ai κ_i."""
        assert self.query_factors is not None
        half = self.config.rotary_dim // 2
        pairs = self.components()[: self.qk_head_dim // 2]
        place = torch.arange(half, device=pairs.device)[:, None] == pairs  # [R/2, C]
        real, imaginary = torch.where(place, self.query_factors[:, :, None], 0.0)  # [G, R/2, C]
        upper, lower = torch.cat((real, -imaginary), dim=-1), torch.cat((imaginary, real), dim=-1)
        return torch.cat((upper, lower), dim=1).flatten(0, 1)

    def as_computed(self) -> bool:
        """Whether the indices of rotated components, which are not in checkpoints, are set."""
        held = self.rotated
        return held is None or held.is_meta or torch.equal(held.cpu(), rotated_components(self.config, self.layer_idx))
