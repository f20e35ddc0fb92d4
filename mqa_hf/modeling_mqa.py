"""The canonical stack of layers and the decoder-only model: one class for all converted families.

    B batch, T tokens, S tokens attended to, d hidden size

Layers are in `layer_mqa.py`, positions in `positions_mqa.py`. Tensors are named as in Llama, for PEFT and quantisers.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mqa import ATTENTION_NAME, OWN, eager_attention_forward
from .cache_mqa import DecodeCache
from .compat_mqa import cache_name, one_cache, refuse_unread
from .configuration_checks_mqa import BIAS_POSITIONS, of_layer
from .configuration_mqa import MQAConfig
from .decoding_mqa import Decoding, FastDecoding
from .initial_mqa import initialise
from .latent_mqa import MQALatentAttention
from .layer_mqa import (
    MQAMLP,
    MQAAttention,
    MQADecoderLayer,
    MQAHeadTransform,
    make_norm,
    project,
    scaled_logits,
)
from .positions_mqa import (
    Mask,
    MQARotaryEmbedding,
    PositionBias,
    make_masks,
    query_scale,
    relative_bucket,
    sinusoids,
)

__all__ = [
    "MQAMLP",
    "MQAAttention",
    "MQADecoderLayer",
    "MQAForCausalLM",
    "MQAForQuestionAnswering",
    "MQAForSequenceClassification",
    "MQAForTokenClassification",
    "MQALatentAttention",
    "MQAModel",
    "MQAPreTrainedModel",
    "MQARotaryEmbedding",
    "project",
    "relative_bucket",
    "sinusoids",
]

logger = logging.get_logger(__name__)
TAKE_LATENTS = ("eager", "sdpa")  # attention with keys and values of different widths
CACHE = cache_name()
ATTENTIONS = (MQAAttention, MQALatentAttention)
# With label smoothing, Trainer shifts labels only for classes named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mqa", "MQAForCausalLM")


class MQAEmbedding(nn.Embedding):
    """Token embeddings times a constant; `inputs_embeds` are expected with the factor applied."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


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
    _keep_in_fp32_modules_strict = ["router_correction"]  # corrections are small differences of larger numbers
    _can_record_outputs = {
        "hidden_states": MQADecoderLayer,
        "attentions": [OutputRecorder(kind, index=1, layer_name="self_attn") for kind in ATTENTIONS],
        "cross_attentions": [OutputRecorder(kind, index=1, layer_name="cross_attn") for kind in ATTENTIONS],
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise(module, self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in the file of this class

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the requested implementation of experts, by default grouped products, which need rows of a multiple
        of 16 bytes."""
        widths = (getattr(self.config, name, None) for name in ("hidden_size", "expert_intermediate_size"))
        if requested_experts is None and any(width % 8 for width in widths if width):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return the requested attention, by default this package's; raise ValueError if it cannot run the model."""
        name = super().get_correct_attn_implementation(requested_attention or ATTENTION_NAME, is_init_check)
        positions = getattr(self.config, "position_embedding", None)
        if positions in BIAS_POSITIONS and name not in (ATTENTION_NAME, "eager", "sdpa"):
            raise ValueError(
                f"{positions} positions are a bias on the attention logits, which {name} does not support; use "
                f"{ATTENTION_NAME}, eager or sdpa"
            )
        latent = getattr(self.config, "latent", False)
        if latent and name not in (*OWN, *TAKE_LATENTS):
            raise ValueError(
                f"a latent has keys and values of different widths, which {name} does not support; use "
                f"{ATTENTION_NAME}, {' or '.join(TAKE_LATENTS)}"
            )
        # Only what is listed takes these arguments; the others would ignore them.
        for field, takes in (
            ("attention_softcap", ("eager", "flex_attention", "flash_attention_2")),
            ("attention_sinks", ("eager", "flex_attention")),
        ):
            if getattr(self.config, field, None) and name not in (*OWN, *takes):
                usable = [ATTENTION_NAME, *(one for one in takes if not latent or one in TAKE_LATENTS)]
                raise ValueError(f"{name} does not support {field}; use {' or '.join(usable)}")
        return name


class MQAModel(MQAPreTrainedModel):
    """A stack of layers without a language-model head: a decoder-only model, or an encoder or decoder."""

    config: MQAConfig

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
        self.head_transform = MQAHeadTransform(config) if config.head_transform is not None else None
        self.rotary_emb = MQARotaryEmbedding(config) if config.position_embedding == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Mask = None,
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
            input_ids: [B, T]; or `inputs_embeds` [B, T, embedding_size].
            attention_mask: [B, past + T], 1 for tokens and 0 for padding; or a 4D mask; or a dict of 4D masks by layer
                type.
            position_ids: [B, T]. Default: positions after those in the cache.
            past_key_values, cache: the cache, under either name; extended in place.
            encoder_hidden_states: [B, S, d], for cross-attention.
            encoder_attention_mask: [B, S], 1 for tokens and 0 for padding.

        Returns:
            `last_hidden_state` [B, T, embedding_size] and the cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
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
        kwargs.update(self.of_known_tokens(x, position_ids, cache))
        if self.config.query_scaling_beta is not None:
            kwargs["query_scale"] = query_scale(position_ids[:, None, :, None], self.config).to(x.dtype)

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

    def of_known_tokens(self, x: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> dict[str, Any]:
        """Rotary angles of all cached tokens, for layers that rebuild their keys."""
        if not isinstance(cache, DecodeCache) or cache.positions is None:
            return {}
        assert self.rotary_emb is not None
        positions = cache.note(position_ids.expand(len(x), -1))
        if positions.shape[1] == x.shape[1]:
            return {}
        return {"key_position_embeddings": self.rotary_emb(x, positions)}

    def cache_to_fill(self, cache: Any, encoder_hidden_states: torch.Tensor | None, use_cache: bool | None) -> Any:
        """The cache that layers write to: the given one, a new one, or none."""
        if not self.config.causal:
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:  # recomputed layers would write to it twice
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
        """Replace the sliding windows that generate() gives the cross-attention's cache by all `length` tokens."""
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
        """Map token embeddings [B, T, embedding_size] to the input of the first layer [B, T, d]."""
        if self.config.scale_inputs_embeds:
            inputs_embeds = inputs_embeds * self.config.embedding_scale
        x = inputs_embeds if self.project_in is None else self.project_in(inputs_embeds)
        if self.embed_norm is not None and self.config.embedding_norm_first:
            x = self.embed_norm(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids.to(x.device))
        elif self.config.position_embedding == "sinusoidal":
            x = x + sinusoids(position_ids.to(x.device), self.config).to(x.dtype)
        if self.embed_norm is not None and not self.config.embedding_norm_first:
            x = self.embed_norm(x)
        return nn.functional.dropout(x, self.config.embedding_dropout, self.training)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Map the output of the last layer [B, T, d] to the input of the head [B, T, embedding_size]."""
        if self.norm is not None:
            x = self.norm(x)
        x = x if self.project_out is None else self.project_out(x)
        return x if self.head_transform is None else self.head_transform(x)

    def make_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Mask,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """Make the mask of each layer type, in the form that the attention implementation takes."""
        return make_masks(self.config, inputs_embeds, attention_mask, position_ids, cache)

    def position_bias(
        self, masks: dict[str, Any], attention_mask: Mask, x: torch.Tensor, cache: Cache | None
    ) -> PositionBias:
        """Make the function that returns a layer's mask with the ALiBi or relative-position bias added."""
        return PositionBias(self.config, masks, attention_mask, x, cache)

    def default_position_ids(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: Mask,
        cache: Cache | None,
    ) -> torch.Tensor:
        T = inputs_embeds.shape[1]
        past = cache.get_seq_length() if cache is not None else 0
        if self.config.positions_from_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            # Padding gets position 0; its outputs are masked everywhere else.
            return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)[:, -T:]
        return (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)


class MQAForCausalLM(FastDecoding, MQAPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head; `AutoModelForCausalLM` loads converted checkpoints as this class.

    `decoding` ([`Decoding`]) controls how `generate()` decodes.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]

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
            labels: [B, T], shifted internally; -100 is ignored.
            logits_to_keep: compute only this many of the last logits (0: all), or those at the given indices.

        Returns:
            `logits` [B, T, vocab_size], the mean cross-entropy `loss` in nats if labels are given, and the cache.
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
        logits = scaled_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config)
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
        inputs_embeds: torch.Tensor | None = None,  # generate() looks for it in this signature
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
        """Use sdpa instead of this package's attention, whose name continuous batching does not know."""
        if self.config.position_embedding in BIAS_POSITIONS:
            raise ValueError(
                f"continuous batching does not support the bias of {self.config.position_embedding} positions; use "
                "generate()"
            )
        names = {"latent": "latents", "attention_softcap": "capped logits", "attention_sinks": "attention sinks"}
        for field, what in names.items():
            if getattr(self.config, field):
                raise ValueError(f"continuous batching does not support {what}; use generate()")
        layers, held = range(self.config.num_hidden_layers), (self.config.qk_head_dim, self.config.v_head_dim)
        widths = {of_layer(width, layer) for width in held for layer in layers}
        if widths != {self.config.head_dim}:
            raise ValueError(
                f"continuous batching stores heads of width {self.config.head_dim} alone, and this model has keys and "
                f"values of widths {', '.join(map(str, sorted(widths)))}; use generate()"
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


# transformers' generic classes make their stack with `AutoModel`, which asks before it runs a checkpoint's own code.
class MQAForSequenceClassification(GenericForSequenceClassification, MQAPreTrainedModel):
    """The decoder with a score of each of `config.num_labels` classes at the last token that is not padding."""

    def __init__(self, config: MQAConfig):
        MQAPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = MQAModel(config)
        self.score = nn.Linear(config.embedding_size, config.num_labels, bias=False)
        self.post_init()


class MQAForTokenClassification(GenericForTokenClassification, MQAPreTrainedModel):
    """The decoder with a score of each of `config.num_labels` classes at each token."""

    def __init__(self, config: MQAConfig):
        MQAPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = MQAModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.embedding_size, config.num_labels)
        self.post_init()


class MQAForQuestionAnswering(GenericForQuestionAnswering, MQAPreTrainedModel):
    """The decoder with scores of the first and the last token of an answer."""

    def __init__(self, config: MQAConfig):
        MQAPreTrainedModel.__init__(self, config)
        self.model = MQAModel(config)
        self.qa_outputs = nn.Linear(config.embedding_size, 2)
        self.post_init()
