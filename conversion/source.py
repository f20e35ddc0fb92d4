"""The source checkpoint: a directory, or a hub id that is downloaded."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from mqa_hf.base.errors import ConversionError
from mqa_hf.base.files import REPORT_FILE, read_json
from mqa_hf.base.hub import locate

from .checkpoint import CheckpointReader, Reader
from .families import OWN, check_known

# Fields with the number of layers. A damaged value would exhaust memory.
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
MOST_LAYERS = 10_000
# Rotary fields whose type transformers does not check.
ROPE_NUMBERS = (
    *("rope_theta", "rope_local_base_freq", "rotary_emb_base", "partial_rotary_factor", "rotary_pct"),
    *("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
    *("mscale", "mscale_all_dim", "original_max_position_embeddings"),
)
UNBOUNDED = "time_step_limit"  # a field of state-space layers, in which infinity means no bound


@dataclass(frozen=True)
class Source:
    """A checkpoint directory and its configuration.

    Attributes:
        name: the hub id or path that the user gave.
        directory: where the files are.
        revision: the commit, for a hub id.
        config: the configuration as transformers reads it.
        raw: the content of `config.json`.
    """

    name: str
    directory: Path
    revision: str | None
    config: PreTrainedConfig
    raw: dict[str, Any]

    def reader(self, allow_nonfinite: bool = False) -> Reader:
        """Return a reader of the weights; reads their headers now."""
        return CheckpointReader(self.directory, allow_nonfinite)


def open_source(source: str | os.PathLike, revision: str | None = None, *, weights: bool = True) -> Source:
    """Open a source; a hub id is downloaded.

    Args:
        source: a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        weights: whether to download the weights.

    Raises:
        ConversionError: if there is no such checkpoint or its configuration cannot be read.
    """
    return read_source(str(source), *locate(source, revision, weights=weights))


def read_source(name: str, directory: Path, commit: str | None) -> Source:
    """Read a source that [`locate`] has found; errors as in [`open_source`]."""
    raw = read_json(directory / "config.json")
    check_known(raw.get("model_type"))
    if raw["model_type"] in OWN and (directory / REPORT_FILE).is_file():
        raise ConversionError("the source is already a converted checkpoint; convert the original instead")
    for layers in LAYERS:
        if isinstance(raw.get(layers), int) and raw[layers] > MOST_LAYERS:
            said = f"{layers} is {raw[layers]:,}, more layers than any model has"
            raise ConversionError(f"{directory / 'config.json'}: {said}")
    check_numbers(directory / "config.json", raw)
    config = load_config(directory)
    config._attn_implementation = None  # the conversion needs no attention kernel
    return Source(name, directory, commit, config, raw)


def check_numbers(path: Path, raw: dict[str, Any]) -> None:
    """Raise ConversionError if a number in `config.json` is NaN, infinite or a string."""
    for name, value in leaves(raw):
        last = name.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value) and (last != UNBOUNDED or math.isnan(value)):
            raise ConversionError(f"{path}: {name} is {value}, not a finite number")
        if isinstance(value, str) and last in ROPE_NUMBERS:
            raise ConversionError(f"{path}: {name} is the string {value!r}, not a number")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars of a JSON value with their dotted names."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        inside = f"{name}." if name and isinstance(value, dict) else ""
        for key, item in items:
            yield from leaves(item, f"{inside}{key}")
    else:
        yield name, value


def load_config(directory: Path) -> PreTrainedConfig:
    """Read a configuration with transformers; raises ConversionError if that fails."""
    path = directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # configuration classes raise any type
        raise ConversionError(f"transformers refuses {path}: {error}") from error
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None and not isinstance(part.dtype, torch.dtype | None):
            raise ConversionError(f"{path}: dtype is {part.dtype!r}, not the name of a type such as float32")
    return config
