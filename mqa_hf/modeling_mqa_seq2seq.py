"""The canonical encoder-decoder model: two stacks of `modeling_mqa.py`, the decoder with cross-attention.

B batch, S source tokens, T target tokens, d hidden size
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .configuration_mqa import MQAConfig
from .configuration_mqa_seq2seq import MQASeq2SeqConfig
from .decoding_mqa import Decoding, FastDecoding
from .layer_mqa import scaled_logits
from .modeling_mqa import CACHE, MQAModel, MQAPreTrainedModel


def shift_right(labels: torch.Tensor, start: int | None, pad: int | None, start_is_last: bool = False) -> torch.Tensor:
    """Shift labels [B, T] right to make the decoder's input; `start` comes first, ignored labels become padding.

    With `start_is_last`, a row starts with its last label, the language token (mBART), instead of `start`.
    """
    if pad is None or (start is None and not start_is_last):
        raise ValueError(
            f"labels need decoder_start_token_id (got {start}) and pad_token_id (got {pad}); set both in the "
            "configuration, or pass decoder_input_ids"
        )
    filled = labels.masked_fill(labels == -100, pad)
    if start_is_last:
        first = filled.gather(1, (filled != pad).sum(1, keepdim=True) - 1)
    else:
        assert start is not None
        first = labels.new_full((labels.shape[0], 1), start)
    return torch.cat((first, filled[:, :-1]), dim=1)


class MQAAudioEncoder(MQAModel):
    """An encoder of log-mel spectrograms: two convolutions, the second with stride 2, then layers (Whisper)."""

    main_input_name = "input_features"

    def __init__(self, config: MQAConfig):
        super().__init__(config)
        assert config.num_mel_bins is not None
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.post_init()

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """
        Args:
            input_features: [B, mels, 2 · max_position_embeddings].
            attention_mask: ignored; padding is silence in the features.

        Returns:
            `last_hidden_state` [B, max_position_embeddings, d].
        """
        expected = 2 * self.config.max_position_embeddings
        if input_features.shape[-1] != expected:
            raise ValueError(
                f"input_features must have {expected} frames, got {input_features.shape[-1]}; pad or cut the audio, "
                "as the checkpoint's feature extractor does"
            )
        outputs = super().forward(inputs_embeds=self.heard(input_features), **kwargs)
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def heard(self, input_features: torch.Tensor) -> torch.Tensor:
        """[B, mels, frames] -> [B, frames / 2, d], in place of embeddings."""
        x = nn.functional.gelu(self.conv1(input_features))
        return nn.functional.gelu(self.conv2(x)).transpose(1, 2)


class MQASeq2SeqPreTrainedModel(MQAPreTrainedModel):
    config_class: Any = MQASeq2SeqConfig
    # Encoder and decoder record attentions and hidden states themselves.
    _can_record_outputs: dict[str, Any] = {}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tie the encoder's embedding and the head to the decoder's embedding, each by its own option."""
        prefix = "" if isinstance(self, MQASeq2SeqModel) else "model."
        embedding = f"{prefix}decoder.embed_tokens.weight"
        tied = {f"{prefix}encoder.embed_tokens.weight": embedding} if self.config.share_embeddings else {}
        if prefix and self.config.tie_word_embeddings:
            tied["lm_head.weight"] = embedding
        return tied


class MQASeq2SeqModel(MQASeq2SeqPreTrainedModel):
    """Encoder and decoder without the language-model head."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: MQASeq2SeqConfig):
        super().__init__(config)
        self.encoder = (MQAAudioEncoder if config.num_mel_bins else MQAModel)(config.encoder)
        self.decoder = MQAModel(config.decoder)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embed_tokens = value
        if self.config.share_embeddings:
            self.encoder.embed_tokens = value
            self.config.encoder.vocab_size = value.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids: [B, S]; or `inputs_embeds` [B, S, d]; or, for speech, `input_features` [B, mels, frames].
            attention_mask: [B, S], 1 for tokens and 0 for padding.
            decoder_input_ids: [B, T]; or `decoder_inputs_embeds` [B, T, d].
            decoder_attention_mask: [B, past + T].
            encoder_outputs: from an earlier call, instead of the encoder's input.
            past_key_values, cache: an `EncoderDecoderCache`, under either name; extended in place.
            decoder_position_ids: [B, T]. Default: positions after those in the cache.

        Returns:
            `last_hidden_state` [B, T, d], the cache, and the encoder's output.
        """
        speech = self.config.num_mel_bins is not None
        if encoder_outputs is None:
            source: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            source = {"input_features": input_features} if speech else source
            encoder_outputs = self.encoder(**source, attention_mask=attention_mask, **kwargs)
        elif not hasattr(encoder_outputs, "last_hidden_state"):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("the decoder needs an input; pass decoder_input_ids, decoder_inputs_embeds or labels")

        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=None if speech else attention_mask,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class MQAForConditionalGeneration(FastDecoding, MQASeq2SeqPreTrainedModel, GenerationMixin):
    """Encoder and decoder with a language-model head; `AutoModelForSeq2SeqLM` loads converted checkpoints as this."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {
        "lm_head.weight": "model.decoder.embed_tokens.weight",
        "model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight",
    }

    def __init__(self, config: MQASeq2SeqConfig):
        super().__init__(config)
        decoder = config.decoder
        self.model = MQASeq2SeqModel(config)
        self.lm_head = nn.Linear(decoder.embedding_size, decoder.vocab_size, bias=decoder.lm_head_bias)
        self.loss_type = "ForMaskedLM"  # which does not shift labels again
        self.decoding = Decoding()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Arguments as in [`MQASeq2SeqModel.forward`], and

        Args:
            labels: [B, T], -100 is ignored; shifted right, they are the decoder's input if none is given.
            logits_to_keep: compute only this many of the last logits (0: all), or those at the given indices.

        Returns:
            `logits` [B, T, vocab_size], the mean cross-entropy `loss` in nats if labels are given, and the cache.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scaled_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.decoder)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.decoder.vocab_size, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, **{k: v for k, v in outputs.items() if k != "last_hidden_state"}
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels right; called by `DataCollatorForSeq2Seq`."""
        config = self.config
        return shift_right(labels, config.decoder_start_token_id, config.pad_token_id, config.start_is_last_label)
