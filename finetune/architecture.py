"""Configurations of models to train, and models built from them with random weights."""

import copy
import difflib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mqa_hf.base.errors import MQAError, listing
from mqa_hf.base.files import read_json
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.conversion.families import FAMILIES, canonical_config
from mqa_hf.conversion.loading import capped
from mqa_hf.conversion.source import LAYERS, MOST_LAYERS, load_config
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration

# Fields of earlier layouts of `config.json`, which transformers still reads.
EARLIER = {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"}


def checkpoint_config(directory: Path) -> PreTrainedConfig:
    """Read the configuration of a checkpoint; raises MQAError if that fails."""
    path = directory / "config.json"
    if not path.is_file():
        raise MQAError(f"{directory} is not a checkpoint: it has no config.json")
    check_layers(read_json(path), str(path))
    return load_config(directory)


def configuration(fields: dict[str, Any], option: str = "config") -> PreTrainedConfig:
    """What `config` says, or another option.

    Raises:
        MQAError: where that is no configuration, or has fields that its class does not know.
    """
    check_layers(fields, f"`{option}`")
    config = read(fields, option)
    check_fields(fields, type(config), option)
    if getattr(config, "num_mel_bins", None):
        raise MQAError(f"`{option}`: {config.model_type} is a speech model, which cannot be trained on text")
    return config


def read(fields: dict[str, Any], option: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**copy.deepcopy(fields))
    except Exception as error:  # checks of configurations raise any type
        raise MQAError(f"`{option}` is not a valid configuration: {shortened(error)}") from error


def shortened(error: Exception) -> str:
    """The message of an error as one line of limited length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) < 300 else f"{said[:300]} ..."


def check_layers(fields: dict[str, Any], where: str) -> None:
    """Raise MQAError for an absurd number of layers, whose lists would fill the memory."""
    for stack in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in LAYERS:
            count = stack.get(name)
            if isinstance(count, int | float) and count > MOST_LAYERS:
                raise MQAError(f"{where}: {name} is {count:,}, more layers than any model has")


def check_fields(fields: dict[str, Any], kind: type[PreTrainedConfig], option: str) -> None:
    """Raise MQAError for fields that the configuration class does not know and would ignore."""
    known = {*EARLIER, *kind.attribute_map}
    with suppress(ValueError, TypeError):  # classes without defaults
        known |= {*kind().to_dict()}
    known |= FAMILIES[kind.model_type].inert if kind.model_type in FAMILIES else set()
    for base in kind.__mro__:
        known |= {*inspect.get_annotations(base), *inspect.signature(base).parameters} - {"kwargs"}
    unknown = sorted(set(fields) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise MQAError(f"`{option}`: {kind.model_type} has no {listing(unknown)}{hint}")
    for name, inner in kind.sub_configs.items():
        stack = fields.get(name)
        if isinstance(stack, dict):
            check_fields(stack, CONFIG_MAPPING[stack["model_type"]] if "model_type" in stack else inner, option)


def build(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, option: str = "config") -> PreTrainedModel:
    """Build a model with random weights, in the class of its `model_type`; encoder-decoders in this package's class.

    Raises:
        MQAError: if no model can be built from it; the message names `option`.
    """
    config = configuration(fields, option)
    if not config.is_encoder_decoder:
        end = tokenizer.eos_token_id
        known = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "vocab_size": len(tokenizer)}
        config = read({**known, **fields}, option)
        if config.vocab_size < len(tokenizer):
            raise MQAError(
                f"`{option}` has vocab_size {config.vocab_size}, but the tokenizer has {len(tokenizer)} entries"
            )
        return made(AutoModelForCausalLM.from_config, config, option)
    if not config.model_type.startswith("mqa"):
        config = canonical_config(config, fields)
    for stack in (config.encoder, config.decoder):
        stack.vocab_size = len(tokenizer)
        stack.pad_token_id = tokenizer.pad_token_id
    config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    assert isinstance(config, MQASeq2SeqConfig)
    return made(MQAForConditionalGeneration, config, option)


def made(kind: Callable[[Any], PreTrainedModel], config: PreTrainedConfig, option: str) -> PreTrainedModel:
    """Build a model from a configuration; raises MQAError if that fails or the model exceeds the memory."""
    try:
        with torch.device("meta"):
            size = kind(copy.deepcopy(config)).num_parameters()
    except Exception as error:  # classes raise any type for invalid shapes
        raise MQAError(f"`{option}` cannot be built: {shortened(error)}") from error
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.get_default_device().type != "meta" and 4 * size > memory:
        raise MQAError(
            f"`{option}` gives a model of {size:,} parameters, {4 * size:,} bytes in float32; this machine has "
            f"{memory:,} bytes of memory"
        )
    return capped(kind(config))


def feed_forward_names(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields with the width of feed-forward layers: (dictionary, name) of each."""
    names = ("intermediate_size", "d_ff", "ffn_dim", "n_inner")
    stacks = [fields, *(fields[side] for side in ("encoder", "decoder") if isinstance(fields.get(side), dict))]
    return [{"in": stack, "name": name} for stack in stacks for name in names if name in stack]


def parameters(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, option: str = "config") -> int:
    """Number of parameters of a model, without allocating it."""
    with torch.device("meta"):
        return build(fields, tokenizer, option).num_parameters()


def widened(fields: dict[str, Any], other: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`fields` with feed-forward layers as wide as gives the parameters of `other`, to the nearest multiple of 8.

    Raises:
        MQAError: if `fields` does not have their width.
    """
    fields = copy.deepcopy(fields)
    places = feed_forward_names(fields)
    if not places:
        raise MQAError("`equal_parameters` needs a `config` with the width of its feed-forward layers")
    widths = [place["in"][place["name"]] for place in places]
    goal, now = parameters(other, tokenizer, "equal_parameters"), parameters(fields, tokenizer)
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + 8
    each = (parameters(fields, tokenizer) - now) / 8  # a parameter count is linear in the width
    more = round((goal - now) / each / 8) * 8
    for place, width in zip(places, widths):
        place["in"][place["name"]] = width + more
    if min(widths) + more < 8:
        raise MQAError(f"no feed-forward width turns {now:,} parameters into {goal:,}")
    return fields
