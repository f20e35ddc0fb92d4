"""Describe a checkpoint and what its conversion would give, from its configuration alone."""

from pathlib import Path
from typing import Any

from mqa_hf.base.errors import ConversionError, MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_json
from mqa_hf.base.hub import locate
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from .canonical import CanonicalConfig, count_parameters, decoder_of, latents_of
from .families import ONLY_OWN_CLASS, canonical_config, check_own_heads, family_of
from .inspect import Inspection
from .passthrough import own_class
from .pooling import choose_attentions, with_heads
from .record import ConversionRecord, Origin, TrainingSummary
from .source import Source, read_source


def describe(job: Inspection) -> dict[str, Any]:
    """Implementation of [`Inspection.run`]."""
    directory, commit = locate(job.source, job.revision, weights=False)
    raw = read_json(directory / "config.json")
    result: dict[str, Any] = {"source": job.source, "family": raw.get("model_type"), "conversion": None}
    trained = (directory / TRAINING_FILE).is_file()
    if trained:
        TrainingSummary.read(directory)
    result["training"] = read_json(directory / TRAINING_FILE) if trained else None
    if (directory / REPORT_FILE).is_file():
        return result | _converted(directory, trained)
    result |= {"convertible": True, "reason": None}
    try:
        checkpoint = read_source(str(job.source), directory, commit)
        if checkpoint.config.model_type in ONLY_OWN_CLASS:
            return result | _describe_own_class(checkpoint, job.kv_heads)
        config = canonical_config(checkpoint.config, checkpoint.raw, frozenset(job.ignore_switch))
    except MQAError as error:
        return {**result, "convertible": False, "reason": str(error)}
    result |= _describe(config)
    family = family_of(checkpoint.config.model_type)
    try:
        if family.canonical:
            check_own_heads(config)
        pooled = with_heads(config, job.kv_heads, choose_attentions(config, None))
    except MQAError as error:
        return {**result, "convertible": False, "reason": str(error)}
    for name in ("kv_bytes_per_token", "cross_kv_bytes_per_token"):
        if name in result:
            result[name]["after"] = getattr(pooled, name)
    native = family.native
    try:
        result["native"] = native is not None and native(checkpoint.config, decoder_of(pooled)).model_type
    except MQAError:
        result["native"] = False
    return result


def _converted(directory: Path, trained: bool) -> dict[str, Any]:
    if trained and "command" not in read_json(directory / REPORT_FILE):  # trained without conversion
        source = Origin.read(directory).source
        return {"convertible": False, "reason": f"it was trained from {source}"} | _own(directory)
    record = ConversionRecord.read(directory)
    result: dict[str, Any] = {
        "convertible": False,
        "reason": f"it is a conversion of {record.source}",
        "num_attention_heads": record.num_attention_heads,
        "num_key_value_heads": record.num_key_value_heads.after,
        "parameters": record.parameters,
        "kv_bytes_per_token": {"now": record.kv_bytes_per_token.after},
        "conversion": record.model_dump(mode="json"),
    }
    return result | _own(directory)


def _own(directory: Path) -> dict[str, Any]:
    """Describe a configuration of this package's classes; empty for other classes."""
    canonical: dict[str, Any] = {config.model_type: config for config in (MQAConfig, MQASeq2SeqConfig)}
    model_type = read_json(directory / "config.json").get("model_type")
    if model_type not in canonical:
        return {}
    try:
        return _describe(canonical[model_type].from_pretrained(directory))
    except Exception as error:  # configuration classes raise any type
        raise ConversionError(f"{directory / 'config.json'} is not a valid configuration: {error}") from error


def _describe(config: CanonicalConfig) -> dict[str, Any]:
    stack = decoder_of(config)
    description = {
        "layers": stack.num_hidden_layers,
        "num_attention_heads": stack.num_attention_heads,
        "num_key_value_heads": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "parameters": count_parameters(config),
        "kv_bytes_per_token": {"now": config.kv_bytes_per_token},
    }
    latents = latents_of(config)
    if latents:
        description["latents"] = {name: latent.model_dump() for name, latent in latents.items()}
    if isinstance(config, MQASeq2SeqConfig):
        description |= {
            "encoder_layers": config.encoder.num_hidden_layers,
            "cross_kv_bytes_per_token": {"now": config.cross_kv_bytes_per_token},
        }
    return description


def _describe_own_class(source: Source, kv_heads: int) -> dict[str, Any]:
    own = own_class(source, kv_heads)
    cache = {"now": own.config.kv_bytes_per_token, "after": own.pooled.kv_bytes_per_token}
    return {
        "reason": f"only with mqa-hf convert --target native: {ONLY_OWN_CLASS[source.config.model_type].why}",
        "layers": source.config.get_text_config(decoder=True).num_hidden_layers,
        "num_attention_heads": own.config.num_attention_heads,
        "num_key_value_heads": own.config.num_key_value_heads,
        "head_dim": own.config.head_dim,
        "parameters": sum(parameter.numel() for parameter in own.model.parameters()),
        "kv_bytes_per_token": cache,
        "native": source.config.model_type,
    }
