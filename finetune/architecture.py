"""A model of a configuration, with random weights, and how many parameters it has."""

import copy
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mqa_hf.base.errors import MQAError
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.families import canonical_config
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration


def configuration(fields: dict[str, Any]) -> PreTrainedConfig:
    """What `config` says; raises MQAError where that is no configuration."""
    try:
        return AutoConfig.for_model(**copy.deepcopy(fields))
    except Exception as error:  # whatever the checks of a configuration raise
        raise MQAError(f"`config` is no configuration: {error}") from error


def build(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights in the class of its `model_type`, with an encoder in this package's class."""
    config = configuration(fields)
    if not config.is_encoder_decoder:
        end = tokenizer.eos_token_id
        known = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "vocab_size": len(tokenizer)}
        config = configuration({**known, **fields})
        if config.vocab_size < len(tokenizer):
            raise MQAError(f"`config` has vocab_size {config.vocab_size}, and the tokenizer {len(tokenizer)}")
        return AutoModelForCausalLM.from_config(config)
    if not config.model_type.startswith("mqa"):
        config = canonical_config(config, fields)
    known = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    for stack in (config.encoder, config.decoder):
        stack.vocab_size = len(tokenizer)
        stack.pad_token_id = tokenizer.pad_token_id
    config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    assert isinstance(config, MQASeq2SeqConfig)
    return MQAForConditionalGeneration(config)


def feed_forward_names(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a configuration says how wide feed-forward layers are: (dictionary, name) of each."""
    names = ("intermediate_size", "d_ff", "ffn_dim", "n_inner")
    stacks = [fields, *(fields[side] for side in ("encoder", "decoder") if isinstance(fields.get(side), dict))]
    return [{"in": stack, "name": name} for stack in stacks for name in names if name in stack]


def parameters(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    with torch.device("meta"):
        return build(fields, tokenizer).num_parameters()


def widened(fields: dict[str, Any], other: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`fields` with feed-forward layers as wide as gives the parameters of `other`, to the nearest multiple of 8.

    Raises:
        MQAError: where `fields` does not say how wide they are.
    """
    fields = copy.deepcopy(fields)
    places = feed_forward_names(fields)
    if not places:
        raise MQAError("`equal_parameters` needs a `config` that says how wide its feed-forward layers are")
    widths = [place["in"][place["name"]] for place in places]
    goal, now = parameters(other, tokenizer), parameters(fields, tokenizer)
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + 8
    each = (parameters(fields, tokenizer) - now) / 8  # a parameter count is linear in the width
    more = round((goal - now) / each / 8) * 8
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + more
    if min(widths) + more < 8:
        raise MQAError(f"no feed-forward width makes {now:,} parameters {goal:,}")
    return fields
