"""The canonical stack of layers and the decoder-only model: one class for every converted family.

    B batch, T tokens, S tokens attended to, H query heads, G key/value heads, D query/key head width, Dv value head
    width, d hidden size

Tensor names follow Llama, so that PEFT, quantisers and people find what they expect.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mqa import ATTENTION_NAME, eager_attention_forward
from .compat_mqa import cache_name, one_cache, refuse_unread
from .configuration_mqa import MQAConfig, of_layer
from .decoding_mqa import Decoding, FastDecoding

logger = logging.get_logger(__name__)
CACHE = cache_name()
# Trainer shifts labels for label smoothing where it finds the name of the class here, and nowhere else.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mqa", "MQAForCausalLM")
BIAS_POSITIONS = ("alibi", "relative")  # those that add to the attention logits
MASKS: dict[tuple[bool, str], Callable] = {
    (True, "full_attention"): create_causal_mask,
    (True, "sliding_attention"): create_sliding_window_causal_mask,
    (False, "full_attention"): create_bidirectional_mask,
    (False, "sliding_attention"): create_bidirectional_sliding_window_mask,
}


def make_norm(config: MQAConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, config.norm_affine, config.norm_bias)


def sinusoids(position_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """[B, T] -> [B, T, d]: sines in the first half, cosines in the second (arXiv 1706.03762, section 3.5).

    In float32, or in float64 where the positions are.
    """
    half = config.hidden_size // 2
    dtype = torch.float64 if position_ids.dtype == torch.float64 else torch.float32
    steps = torch.arange(half, device=position_ids.device, dtype=dtype)
    frequencies = torch.exp(steps * (-math.log(10000.0) / (half - 1 if config.sinusoidal_endpoint else half)))
    angles = (position_ids + config.position_offset).unsqueeze(-1).to(dtype) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def relative_bucket(distance: torch.Tensor, buckets: int, max_distance: int, causal: bool) -> torch.Tensor:
    """The bucket of each distance (key position minus query position), as T5 has it (arXiv 1910.10683, section 2.1).

    Small distances have a bucket each, larger ones share buckets that widen logarithmically up to `max_distance`.
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


def add_bias(mask: torch.Tensor | None, bias: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """A bias [1, H, T, S] on the attention logits as an additive mask, with a mask of any form folded in.

    `visible` [T, S] stands in for a mask that was left out because the attention function knows it is causal.
    """
    if mask is None:
        mask = visible
    if mask is None:
        return bias
    # A row that sees nothing, of padding, keeps its bias: where all of a row is the lowest number, the backward pass
    # of PyTorch's attention takes each key's weight for 1.
    least = torch.finfo(bias.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask | ~mask.any(-1, keepdim=True), bias, least)
    blind = mask.amax(-1, keepdim=True) <= least / 2
    return torch.where(blind, bias, (mask + bias).clamp(min=least))


class MQAEmbedding(nn.Embedding):
    """Token embeddings times a constant; given as `inputs_embeds` they are taken as they come from here."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


class MQARotaryEmbedding(nn.Module):
    """Cosines and signed sines of the rotary position embedding (arXiv 2104.09864), any of transformers' rope types.

    Returns `cos` and `sin`, each [B, 1, T, R] with R rotated components, for [`rotate`]; the first half of `sin` is
    negated, which saves a negation and a concatenation each time it is used.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: MQAConfig):
        super().__init__()
        # transformers recomputes the buffers of any module so named from these attributes, after loading on `meta`.
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        default = self.rope_type == "default"
        rope_init: Callable = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MQAConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        base = config.rope_parameters["rope_theta"]
        dim = config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / base**exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)

    def as_computed(self) -> bool:
        """Whether the frequencies, which no checkpoint holds, are there."""
        held = self.original_inv_freq
        expected = MQARotaryEmbedding(self.config).original_inv_freq.to(held.dtype)  # cast where the model was
        return held.is_meta or torch.allclose(held.cpu().float(), expected.float(), rtol=1e-5, atol=0.0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotate the first R of every `head_dim` components of x, pairing component j with j + R/2.

    Args:
        x: [B, heads, T, m·head_dim]; each of the m blocks is rotated by the same angles.
        cos, sin: [B, 1, T, R] of [`MQARotaryEmbedding`].
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


def rotated_components(config: MQAConfig, layer: int) -> torch.Tensor:
    """Where the cosine and sine of each rotated component of a layer stand among those of all frequencies."""
    assert config.rope_frequencies is not None
    pairs = torch.tensor(config.rope_frequencies[layer], dtype=torch.long)
    return torch.cat((pairs, pairs + config.rotary_dim // 2))


def project(linear: nn.Linear, x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, d] -> [B, heads, T, width]."""
    return linear(x).view(*x.shape[:2], -1, width).transpose(1, 2)


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
        chosen = config.rope_frequencies is not None and self.rotary
        self.register_buffer("rotated", rotated_components(config, layer_idx) if chosen else None, persistent=False)
        self.q_proj = nn.Linear(d, H * self.qk_head_dim, bias=config.query_bias)
        self.k_proj = nn.Linear(d, G * self.qk_head_dim, bias=config.key_bias)
        self.v_proj = nn.Linear(d, G * self.v_head_dim, bias=config.value_bias)
        self.o_proj = nn.Linear(H * self.v_head_dim, d, bias=config.output_bias)
        owns_bias = config.position_embedding == "relative" and (config.relative_per_layer or layer_idx == 0)
        self.relative_bias = nn.Embedding(config.relative_buckets, H) if owns_bias and not cross else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape
        query = project(self.q_proj, hidden_states, self.qk_head_dim)
        cache, known = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if self.cross else past_key_values.self_attention_cache
            known = self.cross and past_key_values.is_updated.get(self.layer_idx, False)
        if known and cache is not None:
            stored: Any = cache.layers[self.layer_idx]  # an offloaded cache keeps it elsewhere
            key, value = stored.keys.to(query.device), stored.values.to(query.device)
        else:
            states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key = project(self.k_proj, states, self.qk_head_dim)
            value = project(self.v_proj, states, self.v_head_dim)
            if self.rotary and position_embeddings is not None:
                query, key = self.rotate(query, *position_embeddings), self.rotate(key, *position_embeddings)
            if cache is not None and not isinstance(cache, Cache) and CACHE != "cache":
                kwargs["cache"] = cache  # a paged cache, which before 5.24 the attention function extends
            elif cache is not None:
                # From 5.24 on a paged cache reads and sets what the attention function is given beside.
                beside = {"kwargs": kwargs} if CACHE == "cache" else {}
                key, value = cache.update(key, value, self.layer_idx, **beside)
                if self.cross and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True

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
            **kwargs,
        )
        return self.o_proj(output.reshape(B, T, -1)), weights

    def as_computed(self) -> bool:
        """Whether the places of rotated components, which no checkpoint holds, are there."""
        return (
            self.rotated is None
            or self.rotated.is_meta
            or torch.equal(self.rotated.cpu(), rotated_components(self.config, self.layer_idx))
        )

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys [B, heads, T, qk_head_dim]; `cos` and `sin` are those of all frequencies."""
        if self.rotated is None:
            return rotate(x, cos, sin, self.head_dim)
        return rotate(x, cos[..., self.rotated], sin[..., self.rotated], self.qk_head_dim)


class MQAMLP(nn.Module):
    def __init__(self, config: MQAConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.activation_dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        else:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.training and self.dropout:
            inner = nn.functional.dropout(inner, self.dropout)
        return self.down_proj(inner)


class MQADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MQAConfig, layer_idx: int):
        super().__init__()
        self.residual = config.residual
        self.residual_multiplier = config.residual_multiplier
        self.hidden_dropout = config.hidden_dropout
        self.self_attn = MQAAttention(config, layer_idx)
        self.mlp = MQAMLP(config)
        self.input_layernorm = make_norm(config)
        if config.cross_num_key_value_heads:
            self.cross_attn = MQAAttention(config, layer_idx, cross=True)
            self.cross_attn_layernorm = make_norm(config)
        if config.residual != "parallel_shared_norm":
            self.post_attention_layernorm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = hidden_states
        normed = x if self.residual == "post_norm" else self.input_layernorm(x)
        attended, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        attended = self.added(attended)
        if self.residual in ("sequential", "post_norm"):
            x = x + attended
            x = self.input_layernorm(x) if self.residual == "post_norm" else x
            if encoder_hidden_states is not None:
                normed = x if self.residual == "post_norm" else self.cross_attn_layernorm(x)
                attended, _ = self.cross_attn(
                    normed,
                    attention_mask=encoder_attention_mask,
                    past_key_values=past_key_values,
                    encoder_hidden_states=encoder_hidden_states,
                    **kwargs,
                )
                x = x + self.added(attended)
                x = self.cross_attn_layernorm(x) if self.residual == "post_norm" else x
            if self.residual == "post_norm":
                return self.post_attention_layernorm(x + self.added(self.mlp(x)))
            return x + self.added(self.mlp(self.post_attention_layernorm(x)))
        if self.residual == "parallel":
            normed = self.post_attention_layernorm(x)
        return x + attended + self.added(self.mlp(normed))

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What a sub-layer with this output adds to the residual stream."""
        if self.residual_multiplier != 1.0:
            x = x * self.residual_multiplier
        return nn.functional.dropout(x, self.hidden_dropout, True) if self.training and self.hidden_dropout else x


class MQAPreTrainedModel(PreTrainedModel):
    config_class = MQAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MQADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": MQADecoderLayer,
        "attentions": OutputRecorder(MQAAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MQAAttention, index=1, layer_name="cross_attn"),
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MQAAttention) and module.rotated is not None:  # not in the checkpoint
            init.copy_(module.rotated, rotated_components(module.config, module.layer_idx))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Folded attention is the default of this class; any other that can run the model is taken when asked for."""
        name = super().get_correct_attn_implementation(requested_attention or ATTENTION_NAME, is_init_check)
        positions = getattr(self.config, "position_embedding", None)
        if positions in BIAS_POSITIONS and name not in (ATTENTION_NAME, "eager", "sdpa"):
            raise ValueError(
                f"{positions} positions are a bias of the attention logits, for which {name} has no place; use "
                f"{ATTENTION_NAME}, eager or sdpa"
            )
        return name


class MQAModel(MQAPreTrainedModel):
    """A stack of layers without a head: the decoder-only model, or either side of an encoder-decoder one."""

    def __init__(self, config: MQAConfig):
        super().__init__(config)
        scale = 1.0 if config.scale_inputs_embeds else config.embedding_scale
        tokens = (config.vocab_size, config.embedding_size, scale)
        self.embed_tokens = None if config.num_mel_bins else MQAEmbedding(*tokens)
        projected = config.embedding_size != config.hidden_size
        self.project_in = nn.Linear(config.embedding_size, config.hidden_size, bias=False) if projected else None
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding == "learned"
            else None
        )
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList([MQADecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config) if config.final_norm else None
        self.project_out = nn.Linear(config.hidden_size, config.embedding_size, bias=False) if projected else None
        self.rotary_emb = MQARotaryEmbedding(config) if config.position_embedding == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, embedding_size], taken as they are.
            attention_mask: [B, past + T], 1 for tokens and 0 for padding; or a ready 4D mask; or a dict of 4D masks
                by layer type.
            position_ids: [B, T]. Default: continue from what the cache holds.
            past_key_values, cache: the cache, by either name, which is extended in place.
            encoder_hidden_states: [B, S, d], for the cross-attention of a decoder with an encoder.
            encoder_attention_mask: [B, S], as `attention_mask`.

        Returns:
            `last_hidden_state` [B, T, embedding_size] and the cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert self.embed_tokens is not None, "an audio encoder takes no token ids"
            inputs_embeds = self.embed_tokens(input_ids)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        refuse_unread(f"{type(self).__name__}.forward()", kwargs, attention)
        whole = self.cache_to_fill(one_cache(past_key_values, cache), encoder_hidden_states, use_cache)
        cache = whole.self_attention_cache if isinstance(whole, EncoderDecoderCache) else whole
        if position_ids is None:
            position_ids = self.default_position_ids(inputs_embeds, attention_mask, cache)
        masks = self.make_masks(inputs_embeds, attention_mask, position_ids, cache)
        encoder_mask: Any = None
        if encoder_hidden_states is not None:
            encoder_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )

        x = self.enter(inputs_embeds, position_ids)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(x, position_ids)

        biased = self.position_bias(masks, attention_mask, x, cache)
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            x = layer(
                x,
                biased(layer, layer_type),
                encoder_hidden_states,
                encoder_mask,
                position_embeddings=position_embeddings,
                past_key_values=whole,
                position_ids=position_ids,
                **kwargs,
            )
            if self.config.clamp_float16 and x.dtype == torch.float16:
                x = x.clamp(-64504, 64504)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.leave(x), **{CACHE: whole})

    def cache_to_fill(self, cache: Any, encoder_hidden_states: torch.Tensor | None, use_cache: bool | None) -> Any:
        """The cache that layers write to: the one that is given, a new one, or none."""
        if not self.config.causal:
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:  # layers that run a second time would write a second time
                logger.warning_once("a cache is not used while training with gradient checkpointing")
            return None
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
            if encoder_hidden_states is not None:
                cache = EncoderDecoderCache(cache, DynamicCache())
        if isinstance(cache, EncoderDecoderCache) and self.config.sliding_window and encoder_hidden_states is not None:
            self.widen_cross_cache(cache, encoder_hidden_states.shape[1])
        return cache

    def widen_cross_cache(self, cache: Any, length: int) -> None:
        """generate() gives the cross-attention the windows of self-attention; it sees all `length` source tokens."""
        cross: Any = cache.cross_attention_cache
        if any(cache.is_updated.values()) or type(cross) not in (DynamicCache, StaticCache):
            return
        full = copy.copy(self.config)
        full.sliding_window, full.layer_types = None, ["full_attention"] * full.num_hidden_layers
        if isinstance(cross, StaticCache):
            cache.cross_attention_cache = StaticCache(config=full, max_cache_len=length)
        else:
            cache.cross_attention_cache = DynamicCache(config=full, offloading=cross.offloading)

    def enter(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """From token embeddings [B, T, embedding_size] to the input of the first layer [B, T, d]."""
        if self.config.scale_inputs_embeds:
            inputs_embeds = inputs_embeds * self.config.embedding_scale
        x = inputs_embeds if self.project_in is None else self.project_in(inputs_embeds)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids.to(x.device))
        elif self.config.position_embedding == "sinusoidal":
            x = x + sinusoids(position_ids.to(x.device), self.config).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return nn.functional.dropout(x, self.config.embedding_dropout, self.training)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """From the output of the last layer [B, T, d] to the input of the head [B, T, embedding_size]."""
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def make_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """The mask of each layer type, in the form that the attention implementation takes."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            CACHE: cache,
        }
        if self.config.causal:
            arguments["position_ids"] = position_ids
        return {name: MASKS[self.config.causal, name](**arguments) for name in set(self.config.layer_types)}

    def position_bias(
        self, masks: dict[str, Any], attention_mask: Any, x: torch.Tensor, cache: Cache | None
    ) -> Callable:
        """The function that gives a layer's mask, with the bias of ALiBi or of relative positions folded in."""
        config, T = self.config, x.shape[1]
        if config.position_embedding not in BIAS_POSITIONS:
            return lambda layer, layer_type: masks[layer_type]
        spans, visible, ready = {}, {}, {}
        past = cache.get_seq_length() if cache is not None else 0
        queries = torch.arange(T, device=x.device) + past
        for name in set(config.layer_types):
            S, first = (T, 0) if cache is None else cache.get_mask_sizes(T, config.layer_types.index(name))
            spans[name] = first, torch.arange(S, device=x.device) + first
            visible[name] = spans[name][1] <= queries[:, None] if config.causal else None
        if config.position_embedding == "alibi":
            slopes = torch.tensor(config.alibi_slopes, device=x.device)[:, None, None]
            counted = None
            if config.positions_from_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                counted = (attention_mask.long().cumsum(1) - 1) * attention_mask.long()
            for name, (first, span) in spans.items():
                keys, here = span[None], queries[None]
                if counted is not None:
                    room = nn.functional.pad(counted, (0, len(span)))
                    keys, here = room[:, first : first + len(span)], counted[:, -T:]
                if config.alibi_bfloat16:
                    scale = config.attention_scale
                    bias = ((slopes / scale).bfloat16() * keys[:, None, None]).float() * scale
                else:
                    # Softmax does not see what a query's keys have in common; small numbers are exact in 16 bits.
                    bias = slopes * (keys[:, None, None] - here[:, None, :, None])
                ready[name] = add_bias(masks[name], bias.to(x.dtype), visible[name])

        def biased(layer: MQADecoderLayer, layer_type: str) -> torch.Tensor:
            table = layer.self_attn.relative_bias
            if table is not None:
                for name, (_, span) in spans.items():
                    bucket = relative_bucket(
                        span - queries[:, None], config.relative_buckets, config.relative_max_distance, config.causal
                    )
                    bias = table(bucket.to(table.weight.device)).permute(2, 0, 1)[None]
                    ready[name] = add_bias(masks[name], bias.to(x.device, x.dtype), visible[name])
            return ready[layer_type]

        return biased

    def distance_bias(self, table: nn.Embedding) -> torch.Tensor:
        """[H, n]: the relative bias of a key n positions before the query; the last one holds for all farther."""
        config = self.config
        distances = torch.arange(config.relative_max_distance + 1, device=table.weight.device)
        buckets = relative_bucket(-distances, config.relative_buckets, config.relative_max_distance, config.causal)
        return table(buckets).t().float().contiguous()

    def default_position_ids(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        T = inputs_embeds.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        if self.config.positions_from_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # Padding gets position 0: what it computes is masked away everywhere else.
            return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -T:]
        return (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)


class MQAForCausalLM(FastDecoding, MQAPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head; what `AutoModelForCausalLM` gives for a converted checkpoint.

    `decoding` says how `generate()` decodes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MQAConfig):
        super().__init__(config)
        self.model = MQAModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.lm_head_bias)
        self.decoding = Decoding()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments as in [`MQAModel.forward`], and

        Args:
            labels: [B, T], shifted inside; -100 is ignored.
            logits_to_keep: compute only the last so many logits (0: all), or those at the given indices.

        Returns:
            `logits` [B, T, vocab_size], the mean cross-entropy `loss` in nats where labels are given, the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,  # named, because generate() looks for it here
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = one_cache(past_key_values, cache)
        if self.config.rope_recompute and cache is not None:
            limit = self.config.rope_parameters["original_max_position_embeddings"]
            if cache.get_seq_length() <= limit < input_ids.shape[1]:
                cache, kwargs["next_sequence_length"] = None, None
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Continuous batching prepares its own paged cache and knows transformers' own attention names only."""
        if self.config.position_embedding in BIAS_POSITIONS:
            raise ValueError(
                f"continuous batching has no place for the bias of {self.config.position_embedding} positions; use "
                "generate()"
            )
        if self.config._attn_implementation == ATTENTION_NAME:
            self.set_attn_implementation("sdpa")
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        implementation = self.config._attn_implementation
        try:
            return super().generate_batch(*args, **kwargs)
        finally:
            self.set_attn_implementation(implementation)
