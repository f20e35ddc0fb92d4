"""The table of families: where each canonical tensor lives in a source checkpoint, and what its config means.

Adding a family is adding a row to one of the modules here and a line in `tests/helpers/sources.py`; CONTRIBUTING.md
walks through it. Names in the rules are without the base model's prefix on either side; `{}` is the layer.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError, MQAError, listing
from mqa_hf.configuration_mqa import MQAConfig, of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from ..operations import at_least_float32
from . import alibi, encoder_decoder, gpt, gpt_rotary, llama, variants
from .base import COPY, Family, Rule, SourceConfig
from .native_only import NATIVE_ONLY, NativeOnly
from .refused import REFUSED

__all__ = [
    "COPY",
    "FAMILIES",
    "NATIVE_ONLY",
    "OWN",
    "REFUSED",
    "Family",
    "NativeOnly",
    "Rule",
    "canonical_config",
    "check_known",
    "check_not_quantised",
    "check_own_heads",
    "family_of",
    "fold_scales",
    "native_config",
]

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **variants.FAMILIES,
    **gpt.FAMILIES,
    **gpt_rotary.FAMILIES,
    **alibi.FAMILIES,
    **encoder_decoder.FAMILIES,
}

# A model of this package's own classes that was trained with all its heads.
OWN = (MQAConfig.model_type, MQASeq2SeqConfig.model_type)
CANONICAL = Family(prefixes=(), config=lambda _: {}, rules=(), canonical=True)

# Switches that no model's function depends on, wherever they stand; how to generate is carried over by itself.
INERT = (
    frozenset(PreTrainedConfig().to_dict())
    | frozenset(GenerationConfig().to_dict())
    | {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "finetuning_task",
        "forced_decoder_ids",
        "gradient_checkpointing",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_sequence_length",
        "model_max_length",
        "num_labels",
        "prefix",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        *(f"{name}_token" for name in ("bos", "eos", "pad", "unk")),
    }
)
# Switches that change nothing while they have these values, in classes that do not read them.
IDLE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "cross_attention_hidden_size": (None,),
    "head_dim": (None,),
    "mlp_bias": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": ({}, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
_ROPE_SPELLINGS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def family_of(model_type: Any) -> Family:
    """The row of a model type; raises ConversionError where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type in OWN:
            return CANONICAL
        if isinstance(model_type, str) and model_type in NATIVE_ONLY:
            raise ConversionError(
                f"{model_type} is converted in its own class only: {NATIVE_ONLY[model_type].why}; use `target` native"
            )
        if isinstance(model_type, str) and model_type in REFUSED:
            raise ConversionError(f"{model_type} cannot be converted: {REFUSED[model_type]}")
        if model_type is None:
            raise ConversionError(
                'config.json has no model_type; add it, as the class in its "architectures" says (T5 is "t5")'
            )
        raise ConversionError(
            f"unsupported model type {model_type!r}; supported are {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md says how to add one"
        )
    return FAMILIES[model_type]


def native_config(source: PreTrainedConfig, pooled: MQAConfig) -> PreTrainedConfig:
    """That of the class of transformers which holds a pooled model; raises ConversionError where there is none."""
    native = family_of(source.model_type).native
    if native is None:
        raise ConversionError(
            f"`target` native: no class of transformers holds a {source.model_type} with fewer key/value heads; use "
            "`target` mqa"
        )
    return native(source, pooled)


def check_known(model_type: Any) -> None:
    """Raises ConversionError for a model type that cannot be converted at all."""
    if not isinstance(model_type, str) or model_type not in NATIVE_ONLY:
        family_of(model_type)


def check_not_quantised(raw: dict[str, Any]) -> None:
    """Raises ConversionError for a `config.json` of quantised weights."""
    if raw.get("quantization_config"):
        raise ConversionError(
            "the source's weights are quantised (quantization_config); dequantise them or convert the original"
        )


def canonical_config(
    source: PreTrainedConfig, raw: dict[str, Any], ignore: frozenset[str] = frozenset()
) -> MQAConfig | MQASeq2SeqConfig:
    """The canonical configuration of a source, with all the K/V heads that the source has.

    Args:
        source: the configuration as transformers reads it.
        raw: `config.json` as it stands.
        ignore: switches that the caller knows to have no effect.

    Raises:
        ConversionError: for an unknown family, a switch that nothing reads, or one without a canonical equivalent.
    """
    family = family_of(source.model_type)
    check_not_quantised(raw)
    if ignore - set(raw):
        raise ConversionError(f"`ignore_switch` {listing(ignore - set(raw))}: config.json has no such switch")
    if isinstance(source, MQAConfig | MQASeq2SeqConfig):
        return own_config(source, raw, ignore)
    recorder = SourceConfig(source)
    try:
        fields = family.config(recorder)
        # T5's classes tie whatever the file says; a file that denies it has a head of its own.
        fields["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", fields["tie_word_embeddings"]))
        config = (MQASeq2SeqConfig if "decoder" in fields else MQAConfig)(**fields, dtype=source.dtype)
    except MQAError:
        raise
    except (ValueError, ArithmeticError, AttributeError, TypeError, KeyError) as error:
        raise ConversionError(f"{source.model_type}: config.json is not a valid configuration: {error}") from error
    aliases = dict(source.attribute_map)
    read = recorder._read | {aliases.get(name, name) for name in recorder._read}
    if "rope_parameters" in read:
        read |= _ROPE_SPELLINGS
    # Names that start with an underscore and are no field of the class are notes of whoever wrote the file.
    notes = {name for name in raw if name.startswith("_") and name not in type(source).__dataclass_fields__}
    tokens = {name for name in raw if name.endswith("_token_id")}
    unknown = set(raw) - read - family.inert - _inert(raw) - notes - tokens - ignore
    if unknown:
        switches = ", ".join(f"{name}={raw[name]!r}" for name in sorted(unknown))
        raise ConversionError(
            f"{source.model_type}: unknown switches in config.json: {switches}; if they do not change what the "
            f"model computes, name them with `ignore_switch`"
        )
    return config


def _inert(raw: dict[str, Any]) -> frozenset[str]:
    """The names in a `config.json` that change nothing, whatever the family."""
    return INERT | {name for name, values in IDLE.items() if name in raw and raw[name] in values}


def own_config(
    source: MQAConfig | MQASeq2SeqConfig, raw: dict[str, Any], ignore: frozenset[str]
) -> MQAConfig | MQASeq2SeqConfig:
    """That of a model of this package's classes, as it is; raises ConversionError for a switch that it has not."""
    unknown = set(raw) - set(type(source)().to_dict()) - _inert(raw) - ignore
    if unknown:
        raise ConversionError(f"{source.model_type} has no switches {listing(unknown)} in config.json")
    return copy.deepcopy(source)


def check_own_heads(config: MQAConfig | MQASeq2SeqConfig) -> None:
    """Raises ConversionError for a model of this package's classes whose heads do not become fewer: fitted ones."""
    for stack in [config] if isinstance(config, MQAConfig) else [config.encoder, config.decoder]:
        if stack.latent:
            raise ConversionError("it has a latent in place of keys and values; convert the original instead")
        layers = range(stack.num_hidden_layers)
        wide = {of_layer(w, i) for w in (stack.qk_head_dim, stack.v_head_dim) for i in layers} - {stack.head_dim}
        if wide:
            raise ConversionError(
                f"its key or value heads are {listing(map(str, sorted(wide)))} wide; only heads of head_dim "
                f"({stack.head_dim}) can be merged"
            )
        if stack.rope_frequencies is not None:
            raise ConversionError("its heads are already fitted (rope_frequencies); convert the original instead")


def fold_scales(family: Family, source: PreTrainedConfig, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    """Multiply a layer's projections by what the canonical model has no switch for, in place."""
    scales = {} if family.scales is None else family.scales(source, layer)
    for projection, scale in scales.items():
        for name, tensor in tensors.items():
            if f".{projection}." in name and scale != 1.0:
                tensors[name] = at_least_float32(tensor) * scale
