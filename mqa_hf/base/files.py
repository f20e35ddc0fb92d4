"""Read and write whole files."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from .errors import MQAError

REPORT_FILE = "conversion.json"
TRAINING_FILE = "uptraining.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # fixed name: overwrites leftovers of killed runs
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises MQAError if the file does not hold one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MQAError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MQAError(f"{path} holds a {type(content).__name__}, not an object with fields")
    return content


class OnceLoader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML would ignore the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice; keep one of them")
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: Any) -> Any:
    """Read a YAML file, a `Path` or package resource; raises MQAError if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise MQAError(f"{path} cannot be read: {error}") from error


def stamps(path: str | os.PathLike) -> list[list[Any]]:
    """Name, size and time of a file, or of the files of a checkpoint, to detect changes.

    Empty for an id on the Hub.
    """
    place = Path(path)
    kinds = (".json", ".safetensors", ".bin", ".model")
    found = sorted(p for p in place.iterdir() if p.suffix in kinds) if place.is_dir() else [place]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found if p.exists()]
