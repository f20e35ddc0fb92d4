"""Speech recognition with the canonical encoder-decoder model: Whisper's generation and pipeline."""

from typing import Any

import torch
from transformers import AutomaticSpeechRecognitionPipeline
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from .configuration_mqa_seq2seq import MQASeq2SeqConfig
from .modeling_mqa_seq2seq import MQAForConditionalGeneration


class MQAForSpeechSeq2Seq(WhisperGenerationMixin, MQAForConditionalGeneration):
    """A converted Whisper, as loaded by `AutoModelForSpeechSeq2Seq`: languages, tasks, timestamps, long audio."""

    main_input_name = "input_features"
    relies_on = ("_prepare_decoder_input_ids_for_generation",)

    def __init__(self, config: MQASeq2SeqConfig):
        super().__init__(config)
        self.max_target_positions = config.max_target_positions

    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As [`MQAForConditionalGeneration.forward`], with `input_features` [B, mels, frames] instead of tokens."""
        return super().forward(
            input_features=input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )

    def _prepare_decoder_input_ids_for_generation(self, batch_size, model_input_name, model_kwargs, *args, **kwargs):
        """Accept prompts without the start token; transformers does so only for model types named Whisper."""
        given = model_kwargs.pop("decoder_input_ids", None)
        if given is not None:
            return given, model_kwargs
        return super()._prepare_decoder_input_ids_for_generation(  # type: ignore[misc]
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )

    def prepare_inputs_for_generation(self, input_ids, *args, decoder_attention_mask=None, **kwargs):
        # In long audio, rows conditioned on fewer earlier tokens are padded on the left.
        if decoder_attention_mask is not None and "decoder_position_ids" not in kwargs:
            positions = (decoder_attention_mask.long().cumsum(-1) - 1).masked_fill(decoder_attention_mask == 0, 0)
            kwargs["decoder_position_ids"] = positions[:, -input_ids.shape[1] :]
        return super().prepare_inputs_for_generation(
            input_ids, *args, decoder_attention_mask=decoder_attention_mask, **kwargs
        )


class MQASpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """transformers' pipeline, made to treat the model as Whisper; it would decide by the model type."""

    type = property(lambda self: "seq2seq_whisper", lambda self, value: None)
