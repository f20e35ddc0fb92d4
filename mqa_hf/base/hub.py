"""Find, download and upload checkpoints, on disk and on the Hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .errors import MQAError
from .files import REPORT_FILE

ADAPTER = "adapter_config.json"
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
# Files beside the weights that are copied unchanged.
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
    "tekken.json",
    "chat_template*",
    CHAT_TEMPLATES,
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.bin.index.json")
# Base class of HTTP errors, whose library depends on the version of huggingface_hub.
HTTPError: type[Exception] = HfHubHTTPError.__base__  # type: ignore[assignment]


def locate(source: str | os.PathLike, revision: str | None = None, *, weights: bool) -> tuple[Path, str | None]:
    """The directory of a checkpoint and, for a hub id, its commit; arguments as in [`open_source`]."""
    directory, commit = Path(source), None
    try:
        if not directory.is_dir():
            if directory.exists():
                raise MQAError(f"{source} is a file; give the directory of a checkpoint")
            if directory.is_absolute() or str(source).startswith((".", "~")):
                raise MQAError(f"the directory {source} does not exist")
            directory = _download(str(source), revision, weights)
            commit = directory.name
        elif revision is not None:
            raise MQAError(f"`revision` {revision} is for hub ids; {source} is a directory")
        if not (directory / "config.json").is_file():
            raise MQAError(f"{source} has no config.json; give the directory of a transformers checkpoint")
    except OSError as error:
        raise MQAError(f"{source} cannot be read: {error}") from error
    check_no_adapter(directory)
    return directory, commit


def check_no_adapter(directory: Path) -> None:
    """Raise MQAError for a checkpoint that transformers loads together with an adapter."""
    if (directory / ADAPTER).is_file():
        raise MQAError(
            f"{directory} has a PEFT adapter beside the weights ({ADAPTER}); merge it first (merge_and_unload) or "
            f"remove it"
        )


def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    try:
        patterns = [*COMPANIONS, "config.json", "README.md", "*.py", REPORT_FILE]
        if weights:
            names = _files_on_hub(repo_id, revision)
            has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
            patterns += SAFETENSORS if has_safetensors else SAFETENSORS + PICKLES
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError, ValueError) as error:
        raise MQAError(
            f"{repo_id} is neither a directory nor a model that can be fetched from the Hub: {error}"
        ) from error


def _files_on_hub(repo_id: str, revision: str | None) -> list[str]:
    """The names of a repository's files; empty without a network, where only the cache can be used."""
    if HF_HUB_OFFLINE:
        return []
    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError):
        return []


def make_repository(repo_id: str, private: bool) -> str:
    """Create the repository before the work, so that a missing token or a taken name fails early.

    Returns:
        The id with its namespace.
    """
    try:
        return HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        raise MQAError(f"cannot push to {repo_id}: {error}") from error


def push(output: Path, repo_id: str, message: str) -> None:
    """Upload a finished directory as one commit; raises MQAError, which leaves the directory as it is."""
    try:
        HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=output,
            commit_message=message,
            delete_patterns=[*SAFETENSORS, *PICKLES],  # shards of an earlier upload
        )
    except (HTTPError, OSError, ValueError) as error:
        raise MQAError(f"{output} is complete, but could not be pushed to {repo_id}: {error}") from error
