"""Configuration of the canonical encoder-decoder model."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .compat_mqa import offer_default_targets
from .configuration_mqa import MQAConfig

SEQ2SEQ_AUTO_MAP = {
    "AutoConfig": "configuration_mqa_seq2seq.MQASeq2SeqConfig",
    "AutoModel": "modeling_mqa_seq2seq.MQASeq2SeqModel",
    "AutoModelForSeq2SeqLM": "modeling_mqa_seq2seq.MQAForConditionalGeneration",
}
SPEECH_AUTO_MAP = {
    "AutoConfig": SEQ2SEQ_AUTO_MAP["AutoConfig"],
    "AutoModel": SEQ2SEQ_AUTO_MAP["AutoModel"],
    "AutoModelForSpeechSeq2Seq": "modeling_mqa_speech.MQAForSpeechSeq2Seq",
}
SPEECH_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "modeling_mqa_speech.MQASpeechRecognitionPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "type": "multimodal",
    }
}


class MQASeq2SeqConfig(PreTrainedConfig):
    r"""
    Configuration of [`MQASeq2SeqModel`] and [`MQAForConditionalGeneration`].

    Args:
        encoder (`MQAConfig` or `dict`): The encoder; `causal` must be `False`.
        decoder (`MQAConfig` or `dict`): The decoder; `cross_num_key_value_heads` must be set.
        share_embeddings (`bool`): Whether encoder and decoder share the token embedding.
        tie_word_embeddings (`bool`): Whether `lm_head` is tied to the decoder's token embedding.
        decoder_start_token_id (`int`, *optional*): The token that generation starts with.
        start_is_last_label (`bool`): With `labels`, start the decoder's input with the last label, the language token
            (mBART), instead of `decoder_start_token_id`.
        forced_decoder_ids (`list[list[int]]`, *optional*): Positions and tokens of the prompt, as in the configuration
            of Whisper checkpoints of 2022; used if the generation configuration has none.
        max_source_positions, max_target_positions, median_filter_width (`int`, *optional*): Read by Whisper's
            `generate()`; the two lengths are those of encoder and decoder.

    Raises:
        ValueError: if encoder and decoder do not fit each other.
    """

    model_type = "mqa_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    sub_configs = {"encoder": MQAConfig, "decoder": MQAConfig}

    encoder: Any = None
    decoder: Any = None
    share_embeddings: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    start_is_last_label: bool = False
    forced_decoder_ids: list[list[int | None]] | None = None
    median_filter_width: int = 7

    def __post_init__(self, **kwargs):
        defaults: dict[str, dict] = {"encoder": {"causal": False}, "decoder": {"cross_num_key_value_heads": 1}}
        for name, fields in defaults.items():
            stack = getattr(self, name)
            stack = stack if isinstance(stack, MQAConfig) else MQAConfig(**(fields if stack is None else stack))
            stack.__dict__.pop("auto_map", None)  # only the whole model has remote code
            setattr(self, name, stack)
        self._check()
        speech = self.encoder.num_mel_bins is not None
        kwargs.setdefault("auto_map", dict(SPEECH_AUTO_MAP if speech else SEQ2SEQ_AUTO_MAP))
        if speech:
            kwargs.setdefault("custom_pipelines", dict(SPEECH_PIPELINES))
        super().__post_init__(**kwargs)
        for stack in (self.encoder, self.decoder):
            stack.dtype = stack.dtype or self.dtype

    def _check(self):
        encoder, decoder = self.encoder, self.decoder
        if encoder.causal or not decoder.causal or not decoder.cross_num_key_value_heads:
            raise ValueError("the encoder must not be causal; the decoder must be causal and have cross-attention")
        if encoder.hidden_size != decoder.hidden_size or encoder.embedding_size != decoder.embedding_size:
            raise ValueError(
                f"encoder and decoder must have the same width, got hidden_size {encoder.hidden_size} and "
                f"{decoder.hidden_size}, embedding_size {encoder.embedding_size} and {decoder.embedding_size}"
            )
        if encoder.num_mel_bins is not None:
            self.share_embeddings = False
        if self.share_embeddings and encoder.vocab_size != decoder.vocab_size:
            raise ValueError(
                f"share_embeddings needs one vocabulary, got {encoder.vocab_size} tokens in the encoder and "
                f"{decoder.vocab_size} in the decoder"
            )

    def to_dict(self) -> dict:
        offer_default_targets()
        return super().to_dict()

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        """Rows of the embeddings, as `resize_token_embeddings` sets it."""
        self.decoder.vocab_size = value
        if self.share_embeddings:
            self.encoder.vocab_size = value

    @property
    def hidden_size(self) -> int:
        return self.decoder.hidden_size

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the decoder."""
        return self.decoder.num_attention_heads

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the decoder."""
        return self.decoder.num_hidden_layers

    @property
    def decoder_layers(self) -> int:
        return self.decoder.num_hidden_layers

    @property
    def num_mel_bins(self) -> int | None:
        return self.encoder.num_mel_bins

    @property
    def max_source_positions(self) -> int:
        return self.encoder.max_position_embeddings

    @property
    def max_target_positions(self) -> int:
        return self.decoder.max_position_embeddings

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes per target token over the decoder's self-attention layers."""
        return self.decoder.kv_bytes_per_token

    @property
    def cross_kv_bytes_per_token(self) -> int:
        """Cache bytes per source token over the cross-attention layers."""
        return self.decoder.cross_kv_bytes_per_token
