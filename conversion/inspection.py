"""What a checkpoint is and what a conversion would make of it, from its configuration alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

from mqa_hf.configuration_mqa import MQAConfig

from .converter import REPORT_FILE
from .errors import ConversionError
from .families import canonical_config, family_of
from .plan import canonical_shapes
from .source import open_source


def inspect(source: str | os.PathLike, *, kv_heads: int = 1, revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint without reading its weights.

    Args:
        source: directory or hub id, of an original or of a converted checkpoint.
        kv_heads: key/value heads of the conversion to describe.
        revision: branch, tag or commit of a hub id.

    Returns:
        `family`, `layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, `parameters`,
        `kv_bytes_per_token` (16 bit; `now` and, where it can be converted, `after`), `convertible`, `reason` (why it
        cannot), `native` (whether a class of transformers holds the result), and `conversion` (the content of
        `conversion.json` of a converted checkpoint, else `None`).

    Raises:
        ConversionError: where there is no checkpoint at all.
    """
    path = Path(source)
    if (path / REPORT_FILE).is_file() and (path / "config.json").is_file():
        return _converted(path)
    result: dict[str, Any] = {"source": str(source), "convertible": True, "reason": None, "conversion": None}
    if path.is_dir() and (path / "config.json").is_file():
        result["family"] = _raw(path).get("model_type")
    try:
        checkpoint = open_source(source, revision, weights=False)
        result["family"] = checkpoint.config.model_type
        config = canonical_config(checkpoint.config, checkpoint.raw)
    except ConversionError as error:
        if "family" not in result:
            raise
        return {**result, "convertible": False, "reason": str(error)}
    result |= _describe(config)
    if kv_heads < 1 or config.num_key_value_heads % kv_heads:
        reason = f"{kv_heads} does not divide its {config.num_key_value_heads} key/value heads"
        return {**result, "convertible": False, "reason": reason}
    pooled = MQAConfig(**{**config.to_dict(), "num_key_value_heads": kv_heads})
    result["kv_bytes_per_token"]["after"] = pooled.kv_bytes_per_token
    native = family_of(checkpoint.config.model_type).native
    try:
        result["native"] = native is not None and native(checkpoint.config, pooled).model_type
    except ConversionError:
        result["native"] = False
    return result


def _converted(path: Path) -> dict[str, Any]:
    try:
        report = json.loads((path / REPORT_FILE).read_text())
        return {
            "source": str(path),
            "family": _raw(path).get("model_type"),
            "num_attention_heads": report["num_attention_heads"],
            "num_key_value_heads": report["num_key_value_heads"]["after"],
            "parameters": report["parameters"],
            "kv_bytes_per_token": {"now": report["kv_bytes_per_token"]["after"]},
            "convertible": False,
            "reason": f"it is a conversion of {report['source']}",
            "conversion": report,
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path / REPORT_FILE} cannot be read: {error}") from error


def _raw(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "config.json").read_text()))
    except ValueError as error:
        raise ConversionError(f"{path / 'config.json'} is not a configuration: {error}") from error


def _describe(config: MQAConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "parameters": sum(math.prod(shape) for shape in canonical_shapes(config).values()),
        "kv_bytes_per_token": {"now": config.kv_bytes_per_token},
    }
