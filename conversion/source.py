"""A source checkpoint: a directory, or a hub id that is fetched."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, PreTrainedConfig

from .errors import ConversionError
from .families import OWN, check_known

REPORT_FILE = "conversion.json"
TRAINING_FILE = "uptraining.json"
ADAPTER = "adapter_config.json"
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
# How configurations call the number of layers; a damaged one would fill the memory with what there is of each.
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
MOST_LAYERS = 10_000
# What stands beside the weights and is carried over as it is.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "target_vocab.json",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template*",
    CHAT_TEMPLATES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.bin.index.json")
# Of the HTTP library, which is not the same in every huggingface_hub: an answer that is an error, or none at all.
HTTPError: type[Exception] = HfHubHTTPError.__base__  # type: ignore[assignment]


@dataclass(frozen=True)
class Source:
    """A checkpoint directory and what its configuration says.

    Attributes:
        name: as the user gave it: a hub id or a path.
        directory: where the files are.
        revision: the commit, for a hub id.
        config: as transformers reads it.
        raw: `config.json` as it stands.
    """

    name: str
    directory: Path
    revision: str | None
    config: PreTrainedConfig
    raw: dict[str, Any]


def open_source(source: str | os.PathLike, revision: str | None = None, *, weights: bool = True) -> Source:
    """Find a source, fetching a hub id.

    Args:
        source: a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        weights: whether to fetch the weights too.

    Raises:
        ConversionError: where there is no such checkpoint, or its configuration cannot be read.
    """
    return read_source(str(source), *locate(source, revision, weights=weights))


def read_source(name: str, directory: Path, commit: str | None) -> Source:
    """A source that [`locate`] has found; errors as of [`open_source`]."""
    raw = read_json(directory / "config.json")
    check_known(raw.get("model_type"))
    if raw["model_type"] in OWN and (directory / REPORT_FILE).is_file():
        raise ConversionError("the source is a converted checkpoint already; convert the original instead")
    for layers in LAYERS:
        if isinstance(raw.get(layers), int) and raw[layers] > MOST_LAYERS:
            said = f"{layers} is {raw[layers]:,}; no model has as many layers"
            raise ConversionError(f"{directory / 'config.json'}: {said}")
    config = load_config(directory)
    config._attn_implementation = None  # a kernel that is not installed here is none of the conversion's
    return Source(name, directory, commit, config, raw)


def load_config(directory: Path) -> PreTrainedConfig:
    """A checkpoint's configuration as transformers reads it; raises ConversionError where it is refused."""
    path = directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever a configuration class raises for values that it refuses
        raise ConversionError(f"transformers refuses {path}: {error}") from error
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None and not isinstance(part.dtype, torch.dtype | None):
            raise ConversionError(f"{path}: dtype is {part.dtype!r}, not the name of a type such as float32")
    return config


def locate(source: str | os.PathLike, revision: str | None = None, *, weights: bool) -> tuple[Path, str | None]:
    """The directory of a checkpoint, and its commit where it is a hub id; arguments as in [`open_source`]."""
    directory, commit = Path(source), None
    try:
        if not directory.is_dir():
            if directory.exists():
                raise ConversionError(f"{source} is a file; give the directory of a checkpoint")
            if directory.is_absolute() or str(source).startswith((".", "~")):
                raise ConversionError(f"there is no directory {source}")
            directory = _download(str(source), revision, weights)
            commit = directory.name
        elif revision is not None:
            raise ConversionError(f"--revision {revision} is for hub ids; {source} is a directory")
        if not (directory / "config.json").is_file():
            raise ConversionError(f"no config.json in {source}: it is not a checkpoint of transformers")
    except OSError as error:
        raise ConversionError(f"{source} cannot be read: {error}") from error
    check_no_adapter(directory)
    return directory, commit


def check_no_adapter(directory: Path) -> None:
    """Raises ConversionError for a checkpoint that transformers loads together with an adapter."""
    if (directory / ADAPTER).is_file():
        raise ConversionError(
            f"{directory} holds an adapter of PEFT beside the weights ({ADAPTER}); merge it first (merge_and_unload), "
            "or move it away"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ConversionError for a file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an object with fields")
    return content


def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    try:
        patterns = [*COMPANIONS, "config.json", "README.md", "*.py", REPORT_FILE]
        if weights:
            names = _files_on_hub(repo_id, revision)
            has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
            patterns += SAFETENSORS if has_safetensors else SAFETENSORS + PICKLES
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError, ValueError) as error:
        raise ConversionError(
            f"{repo_id} is neither a directory nor a model that can be fetched from the Hub: {error}"
        ) from error


def _files_on_hub(repo_id: str, revision: str | None) -> list[str]:
    """The names of a repository's files; none without a network, where the cache holds what there is to have."""
    if HF_HUB_OFFLINE:
        return []
    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError):
        return []
