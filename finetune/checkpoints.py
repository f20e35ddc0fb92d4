"""The working directory of a training: its options and the checkpoints that it resumes from.

It holds `options.json`, as a training only resumes with the same options, and a folder per phase with the checkpoints
of transformers' Trainer; `final` is the result of the phase.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json, write_whole

OPTIONS_FILE = "options.json"


def begin(directory: Path, options: dict[str, Any], restart: bool) -> None:
    """Open the working directory of a job, or reopen it.

    Raises:
        MQAError: if it holds a run with other options.
    """
    state = processes()
    with state.main_process_first():
        if not state.is_main_process:
            return
        if restart:
            shutil.rmtree(directory, ignore_errors=True)
        options = json.loads(json.dumps(options, default=str))
        path = directory / OPTIONS_FILE
        before = options_of(path)
        gone_far = any(directory.glob("*/*/trainer_state.json")) or any(directory.glob("*/final/history.json"))
        if gone_far and before is None:
            raise MQAError(
                f"{directory} holds an unfinished run without readable options ({path.name}); start over with "
                f"`restart`"
            )
        if gone_far and before is not None:
            changed = [n for n in sorted({*before, *options}) if before.get(n) != options.get(n)]
            if changed:
                said = ", ".join(
                    f"{n} was {before.get(n)!r} and is {options.get(n)!r}" for n in changed if n != "files"
                )
                said += "; " * (bool(said) and "files" in changed)
                said += "files of the student, the teacher or the text have changed" * ("files" in changed)
                raise MQAError(
                    f"{directory} holds an unfinished run with other options: {said}; use the same options, or "
                    f"start over with `restart`"
                )
            return
        if before != options:
            shutil.rmtree(directory, ignore_errors=True)  # a tokenizer or a teacher of other options
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(options, indent=2) + "\n")
        except OSError as error:
            raise MQAError(f"{directory} cannot be written: {error}") from error


def options_of(path: Path) -> dict[str, Any] | None:
    """Options of an unfinished run; empty if the file is missing or incomplete."""
    try:
        return read_json(path)
    except MQAError:
        return None


def check_disk(directory: Path, size: float) -> None:
    """Raise MQAError if a checkpoint of `size` bytes does not fit on the disk."""
    there = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise MQAError(f"a checkpoint needs {size:,.0f} bytes, but {there} has {free:,} free")


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint, whose state, written last, is readable. Others are removed."""
    while (found := get_last_checkpoint(str(directory)) if directory.is_dir() else None) is not None:
        with suppress(OSError, ValueError):
            json.loads((Path(found) / "trainer_state.json").read_text())
            return found
        shutil.rmtree(found)
    return None
