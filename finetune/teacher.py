"""The teacher of an uptraining: the original that the student was converted from."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import load_tokenizer
from mqa_hf.conversion.convert import convert
from mqa_hf.conversion.inspect import inspect
from mqa_hf.conversion.loading import load_model


def describe_teacher(name: str, revision: str | None) -> dict[str, Any]:
    """Inspect the teacher; raises MQAError if it cannot be loaded."""
    try:
        return inspect(name, revision=revision)
    except MQAError as error:
        raise MQAError(f"the teacher {name} cannot be loaded; name it with `teacher`: {error}") from error


def load_teacher(
    name: str, revision: str | None, source: Path, student: PreTrainedModel, directory: Path
) -> PreTrainedModel:
    """Load the original in the student's class, with the same layer names and the same handling of packed rows.

    Args:
        name, revision: directory or hub id of the original. A checkpoint of another class than the student's is
            converted with all its heads, which changes nothing but names.
        source: directory of the student.
        student: the loaded student.
        directory: directory for the converted original.

    Raises:
        MQAError: if it cannot be loaded or its tokenizer differs from the student's.
    """
    own = student.config.model_type.startswith("mqa")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with processes().main_process_first():
        description = describe_teacher(name, revision)
        if own and not description["family"].startswith("mqa"):
            if not (directory / "config.json").is_file():
                heads = description["num_key_value_heads"]
                convert(name, directory, kv_heads=heads, revision=revision, overwrite=True)
            name, revision = str(directory), None
        theirs = load_tokenizer(name, revision)
        if load_tokenizer(source).get_vocab() != theirs.get_vocab():
            raise MQAError(f"the teacher {name} has a different tokenizer than the student; it must be the original")
    return load_model(name, dtype=dtype, revision=revision)
