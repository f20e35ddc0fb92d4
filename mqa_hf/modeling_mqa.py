"""The canonical decoder-only model: one class for every converted family.

    B batch, T tokens, H query heads, G key/value heads, D query/key head width, Dv value head width, d hidden size

Tensor names follow Llama, so that PEFT, quantisers and people find what they expect.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mqa import ATTENTION_NAME, eager_attention_forward
from .configuration_mqa import MQAConfig


def make_norm(config: MQAConfig) -> nn.Module:
    norm_class = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.norm_eps, elementwise_affine=config.norm_affine)


class MQARotaryEmbedding(nn.Module):
    """Cosines and signed sines of the rotary position embedding (arXiv 2104.09864), any of transformers' rope types.

    Returns `cos` and `sin`, each [B, 1, T, R] with R rotated components, for [`rotate`]; the first half of `sin` is
    negated, which saves a negation and a concatenation each time it is used.
    """

    inv_freq: torch.Tensor

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
        dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
        return 1.0 / base**exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


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


class MQAAttention(nn.Module):
    """Attention of H query heads over G shared key/value heads (G = 1: multi-query, arXiv 1911.02150)."""

    def __init__(self, config: MQAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rotary = config.rope_layers[layer_idx]
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        d, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, H * self.qk_head_dim, bias=config.query_bias)
        self.k_proj = nn.Linear(d, G * self.qk_head_dim, bias=config.key_bias)
        self.v_proj = nn.Linear(d, G * self.v_head_dim, bias=config.value_bias)
        self.o_proj = nn.Linear(H * self.v_head_dim, d, bias=config.output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(B, T, -1, self.qk_head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(B, T, -1, self.qk_head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(B, T, -1, self.v_head_dim).transpose(1, 2)
        if self.rotary and position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = rotate(query, cos, sin, self.head_dim), rotate(key, cos, sin, self.head_dim)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

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


class MQAMLP(nn.Module):
    def __init__(self, config: MQAConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MQADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MQAConfig, layer_idx: int):
        super().__init__()
        self.residual = config.residual
        self.hidden_dropout = config.hidden_dropout
        self.self_attn = MQAAttention(config, layer_idx)
        self.mlp = MQAMLP(config)
        self.input_layernorm = make_norm(config)
        if config.residual != "parallel_shared_norm":
            self.post_attention_layernorm = make_norm(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
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
        attended = self.dropout(attended)
        if self.residual == "sequential":
            x = x + attended
            return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        if self.residual == "post_norm":
            x = self.input_layernorm(x + attended)
            return self.post_attention_layernorm(x + self.dropout(self.mlp(x)))
        if self.residual == "parallel":
            normed = self.post_attention_layernorm(x)
        return x + attended + self.dropout(self.mlp(normed))

    def dropout(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, self.hidden_dropout, True) if self.training and self.hidden_dropout else x


class MQAPreTrainedModel(PreTrainedModel):
    config_class = MQAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MQADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MQADecoderLayer, "attentions": MQAAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Folded attention is the default of this class; any other is taken when asked for."""
        return super().get_correct_attn_implementation(requested_attention or ATTENTION_NAME, is_init_check)


class MQAModel(MQAPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: MQAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        projected = config.embedding_size != config.hidden_size
        self.project_in = nn.Linear(config.embedding_size, config.hidden_size, bias=False) if projected else None
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding == "learned"
            else None
        )
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
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, embedding_size].
            attention_mask: [B, past + T], 1 for tokens and 0 for padding; or a ready 4D mask; or a dict of 4D masks
                by layer type.
            position_ids: [B, T]. Default: continue from what the cache holds.
            past_key_values: the cache, which is extended in place.

        Returns:
            `last_hidden_state` [B, T, embedding_size] and the cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.default_position_ids(inputs_embeds, attention_mask, past_key_values)

        masks: dict[str, Any]
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            mask_arguments: dict[str, Any] = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            mask_functions = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            masks = {name: mask_functions[name](**mask_arguments) for name in set(self.config.layer_types)}

        x = inputs_embeds if self.project_in is None else self.project_in(inputs_embeds)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids.to(x.device))
        x = nn.functional.dropout(x, self.config.embedding_dropout, self.training)
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(x, position_ids)

        for layer, layer_type in zip(self.layers, self.config.layer_types):
            x = layer(
                x,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        if self.norm is not None:
            x = self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    def default_position_ids(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        T = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if self.config.positions_from_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # Padding gets position 0: what it computes is masked away everywhere else.
            return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -T:]
        return (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)


class MQAForCausalLM(MQAPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head; what `AutoModelForCausalLM` gives for a converted checkpoint."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MQAConfig):
        super().__init__(config)
        self.model = MQAModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.lm_head_bias)
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
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Continuous batching prepares its own paged cache and knows transformers' own attention names only."""
        if self.config._attn_implementation == ATTENTION_NAME:
            self.set_attn_implementation("sdpa")
        return super().init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        implementation = self.config._attn_implementation
        try:
            return super().generate_batch(*args, **kwargs)
        finally:
            self.set_attn_implementation(implementation)
