"""The family table: maps the tensors and configuration of each source family to the canonical model.

To add a family, add a row to one of the modules here and a case to `tests/helpers/sources.py`; see CONTRIBUTING.md.
Names in the rules omit the base model's prefix on both sides; `{}` is the layer number.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError, MQAError, listing
from mqa_hf.configuration_mqa import MQAConfig, of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from ..operations import at_least_float32
from . import alibi, encoder_decoder, experts, experts_variants, gpt, gpt_rotary, llama, normalised, variants
from .base import COPY, Family, Rule, SourceConfig
from .native_only import IMAGE_TEXT, NATIVE_ONLY, ONLY_OWN_CLASS, OWN_CLASS, NativeOnly
from .refused import REFUSED

__all__ = [
    "COPY",
    "FAMILIES",
    "IMAGE_TEXT",
    "NATIVE_ONLY",
    "ONLY_OWN_CLASS",
    "OWN",
    "OWN_CLASS",
    "PREDICTION_FIELDS",
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
    **normalised.FAMILIES,
    **experts.FAMILIES,
    **experts_variants.FAMILIES,
    **gpt.FAMILIES,
    **gpt_rotary.FAMILIES,
    **alibi.FAMILIES,
    **encoder_decoder.FAMILIES,
}

# Models of this package's own classes, trained with all their heads.
OWN = (MQAConfig.model_type, MQASeq2SeqConfig.model_type)
CANONICAL = Family(prefixes=(), config=lambda _: {}, rules=(), canonical=True)

# The number of layers that predict further tokens, which no class of transformers loads; see `packed.py`.
PREDICTION_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
# Switches that never change a model's outputs. Generation settings are carried over separately.
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
        "quantization_config",  # see check_not_quantised
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
        *PREDICTION_FIELDS,
        *(f"{name}_token" for name in ("bos", "eos", "pad", "unk")),
    }
)
# Switches without effect at these values, in classes that do not read them.
IDLE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "cross_attention_hidden_size": (None,),
    "head_dim": (None,),
    "mlp_bias": (False, None),
    "pruned_heads": ({}, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
_ROPE_SPELLINGS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def family_of(model_type: Any) -> Family:
    """Return the row of a model type; raises ConversionError if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type in OWN:
            return CANONICAL
        if isinstance(model_type, str) and model_type in ONLY_OWN_CLASS:
            raise ConversionError(
                f"{model_type} can only be converted in its own class: {ONLY_OWN_CLASS[model_type].why}; use "
                "`target` native"
            )
        if isinstance(model_type, str) and model_type in REFUSED:
            raise ConversionError(f"{model_type} cannot be converted: {REFUSED[model_type]}")
        if model_type is None:
            raise ConversionError(
                'config.json has no model_type; add that of the class in its "architectures" ("t5" for T5)'
            )
        raise ConversionError(
            f"unsupported model type {model_type!r}; supported are {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md says how to add one"
        )
    return FAMILIES[model_type]


def native_config(source: PreTrainedConfig, pooled: MQAConfig) -> PreTrainedConfig:
    """Return the configuration of the transformers class for a pooled model; raises ConversionError if none fits."""
    native = family_of(source.model_type).native
    if native is None:
        raise ConversionError(
            f"`target` native: no class of transformers holds a {source.model_type} with fewer key/value heads; use "
            "`target` mqa"
        )
    return native(source, pooled)


def check_known(model_type: Any) -> None:
    """Raise ConversionError for a model type that cannot be converted at all."""
    if not isinstance(model_type, str) or model_type not in ONLY_OWN_CLASS:
        family_of(model_type)


def check_not_quantised(raw: dict[str, Any]) -> None:
    """Raise ConversionError if `config.json` describes quantised weights that are not unpacked at reading."""
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if raw.get("quantization_config") and (raw.get("model_type"), method) != ("gpt_oss", "mxfp4"):
        raise ConversionError(
            "the source's weights are quantised (quantization_config); dequantise them or convert the original"
        )


def canonical_config(
    source: PreTrainedConfig, raw: dict[str, Any], ignore: frozenset[str] = frozenset()
) -> MQAConfig | MQASeq2SeqConfig:
    """Return the canonical configuration of a source, with all its key/value heads.

    Args:
        source: the configuration as transformers reads it.
        raw: the content of `config.json`.
        ignore: unknown switches to accept because they have no effect.

    Raises:
        ConversionError: for an unknown family, an unknown switch, or a switch without a canonical equivalent.
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
        # T5's classes always tie the embeddings, but a file with tie_word_embeddings=false has its own head.
        fields["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", fields["tie_word_embeddings"]))
        config = (MQASeq2SeqConfig if "decoder" in fields else MQAConfig)(**fields, dtype=source.dtype)
    except MQAError:
        raise
    except (ValueError, ArithmeticError, AttributeError, TypeError, KeyError) as error:
        raise ConversionError(f"{source.model_type}: config.json is not a valid configuration: {error}") from error
    aliases = dict(source.attribute_map)
    read = recorder._read | {aliases.get(name, name) for name in recorder._read}
    read |= {alias for alias, name in aliases.items() if name in read}
    if "rope_parameters" in read:
        read |= _ROPE_SPELLINGS
    # Names that start with an underscore and are not fields of the class are annotations.
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
    """Return the names in `config.json` that have no effect in any family."""
    return INERT | {name for name, values in IDLE.items() if name in raw and raw[name] in values}


def own_config(
    source: MQAConfig | MQASeq2SeqConfig, raw: dict[str, Any], ignore: frozenset[str]
) -> MQAConfig | MQASeq2SeqConfig:
    """Copy the configuration of a model of this package; raises ConversionError for an unknown switch."""
    unknown = set(raw) - set(type(source)().to_dict()) - _inert(raw) - ignore
    if unknown:
        raise ConversionError(f"{source.model_type}: unknown switches in config.json: {listing(unknown)}")
    return copy.deepcopy(source)


def check_own_heads(config: MQAConfig | MQASeq2SeqConfig) -> None:
    """Raise ConversionError if a model of this package has a latent or fitted heads, which cannot be merged."""
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
        if stack.rope_frequencies is not None or stack.query_maps:
            raise ConversionError("its heads are already fitted; convert the original instead")


def fold_scales(family: Family, source: PreTrainedConfig, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    """Multiply a layer's projections in place by the family's scales, for which the canonical model has no switch."""
    scales = {} if family.scales is None else family.scales(source, layer)
    for projection, scale in scales.items():
        for name, tensor in tensors.items():
            if f".{projection}." in name and scale != 1.0:
                tensors[name] = at_least_float32(tensor) * scale
