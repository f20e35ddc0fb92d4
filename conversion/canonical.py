"""The canonical models: configurations, stacks, classes and auto classes."""

import copy
import math
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.modeling_mqa import MQAForCausalLM
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration
from mqa_hf.modeling_mqa_speech import MQAForSpeechSeq2Seq

from .families.native_only import IMAGE_TEXT
from .record import Latent

CanonicalConfig = MQAConfig | MQASeq2SeqConfig
Shapes = dict[str, tuple[int, ...]]
C = TypeVar("C", bound=PreTrainedConfig)

# Pipeline tag on the Hub, by auto class.
PIPELINES: dict[Any, str | None] = {
    AutoModelForCausalLM: "text-generation",
    AutoModelForImageTextToText: "image-text-to-text",
    AutoModelForSeq2SeqLM: None,  # translation, summarisation and more; the source's card says which
    AutoModelForSpeechSeq2Seq: "automatic-speech-recognition",
}


def with_fields(config: C, **fields: Any) -> C:
    """A copy of a configuration with other values in some fields."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def with_stacks(config: CanonicalConfig, **fields: dict[str, Any]) -> CanonicalConfig:
    """A copy with other values in fields of its stacks, which are named `decoder` and `encoder`."""
    config = copy.deepcopy(config)
    for name, values in fields.items():
        for field, value in values.items():
            setattr(stack_of(config, name), field, value)
    return config


def decoder_of(config: CanonicalConfig) -> MQAConfig:
    """The configuration of the decoder."""
    return config.get_text_config(decoder=True)  # type: ignore[return-value]


def stacks_of(config: CanonicalConfig) -> dict[str, MQAConfig]:
    """The configurations of all stacks: `decoder` and, if present, `encoder`."""
    names = ("decoder",) if isinstance(config, MQAConfig) else ("encoder", "decoder")
    return {name: stack_of(config, name) for name in names}


def stack_of(config: CanonicalConfig, attention: str) -> MQAConfig:
    """The configuration of the stack that an attention (a key of [`heads_of`]) is in."""
    if isinstance(config, MQAConfig) or attention != "encoder":
        return decoder_of(config)
    return config.encoder


def longest(config: CanonicalConfig) -> int:
    """The maximum sequence length that all stacks support."""
    limited = ("learned", "sinusoidal", "rotary")
    limits = [s.max_position_embeddings for s in stacks_of(config).values() if s.position_embedding in limited]
    return min(limits, default=2**31)


def heads_of(config: CanonicalConfig) -> dict[str, int]:
    """Number of key/value heads of each attention."""
    decoder = decoder_of(config)
    if isinstance(config, MQAConfig):
        return {"decoder": decoder.num_key_value_heads}
    cross = decoder.cross_num_key_value_heads
    assert cross is not None
    return {
        "decoder": decoder.num_key_value_heads,
        "cross": cross,
        "encoder": config.encoder.num_key_value_heads,
    }


def latents_of(config: CanonicalConfig) -> dict[str, Latent]:
    """Latents by attention (keys of [`heads_of`]), for those that cache one instead of keys and values."""
    found = {}
    for name in heads_of(config):
        stack = stack_of(config, name)
        width = stack.cross_kv_latent_dim if name == "cross" else stack.kv_latent_dim
        if width is not None:
            found[name] = Latent(
                width=width,
                bits=stack.kv_latent_bits,
                heads=stack.kv_latent_heads or stack.num_attention_heads,
                key_components=0 if name == "cross" or not any(stack.rope_layers) else stack.qk_head_dim,
            )
    return found


def canonical_class(config: CanonicalConfig) -> Any:
    """The class that holds a canonical model with its head."""
    if isinstance(config, MQAConfig):
        return MQAForCausalLM
    return MQAForConditionalGeneration if config.num_mel_bins is None else MQAForSpeechSeq2Seq


def auto_class(config: Any) -> Any:
    """The auto class that loads a model of this configuration with its head."""
    if getattr(config, "num_mel_bins", None):
        return AutoModelForSpeechSeq2Seq
    if config.model_type in IMAGE_TEXT:
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a canonical or transformers model on the meta device.

    Raises:
        ConversionError: if the model cannot be built.
    """
    config = copy.deepcopy(config)  # the class modifies it
    try:
        with torch.device("meta"):
            if isinstance(config, CanonicalConfig):
                return canonical_class(config)(config)
            return auto_class(config).from_config(config)
    except Exception as error:  # whatever PyTorch raises for a size beyond its integers
        said = str(error).partition("\n")[0]
        raise ConversionError(
            f"config.json describes a {config.model_type} model that cannot be built: {said}"
        ) from error


def model_shapes(model: PreTrainedModel) -> Shapes:
    """Shapes of the tensors in a checkpoint of the model, in order; tied ones once."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def canonical_shapes(config: CanonicalConfig) -> Shapes:
    return model_shapes(on_meta(config))


def count_parameters(config: CanonicalConfig) -> int:
    """Number of parameters, tied ones once."""
    model = on_meta(config)
    constants = {name for name, _ in model.named_buffers()}
    return sum(math.prod(shape) for name, shape in model_shapes(model).items() if name not in constants)
