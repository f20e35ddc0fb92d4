"""The output directory: written beside its place, and there only when it is whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .errors import ConversionError
from .source import COMPANIONS, REPORT_FILE, read_json

VOCABULARIES = ("tokenizer*", "vocab.*", "*.model", "*.spm", "*.tiktoken")  # one of these is a tokenizer's


def write_whole(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def resolve_output(output: str | os.PathLike, source: Path, overwrite: bool) -> Path:
    """The absolute path of the output, links followed.

    Raises:
        ConversionError: where writing there would lose something, or is impossible.
    """
    try:
        here, there = Path(output).resolve(), source.resolve()
        if here == there:
            raise ConversionError(f"source and output are the same directory: {here}")
        if here in there.parents or there in here.parents:
            raise ConversionError(f"source {there} and output {here} lie in each other")
        if here in (Path.cwd(), *Path.cwd().parents):
            raise ConversionError(f"the working directory is or lies in {here}; give the output a name of its own")
        if here.is_mount():
            raise ConversionError(f"{here} is a mount point, which cannot be replaced; give a directory in it")
        _check_free(here, overwrite)
    except ConversionError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the latter two for loops of links and impossible names
        raise ConversionError(f"cannot write {str(output)!r}: {error}") from error
    return here


def _check_free(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ConversionError(f"{output} is a file; give a directory to write")
    if any(output.iterdir()):
        if not overwrite:
            raise ConversionError(f"{output} exists and is not empty; pass --overwrite to replace it")
        if not (output / REPORT_FILE).is_file():
            raise ConversionError(
                f"{output} was not written by a conversion (no {REPORT_FILE}), so --overwrite does not replace it; "
                "remove it first, or give another output"
            )


@contextmanager
def written_beside(output: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """A directory beside `output` that takes its name at the end, or vanishes.

    Raises:
        ConversionError: where the disk is too small or cannot be written.
    """
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise ConversionError(f"the result takes {size:,} bytes, and {output.parent} has {free:,} free")
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            _take_place(partial, output, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(f"no space left for {size:,} bytes beside {output}; nothing was kept") from error
        raise ConversionError(f"{output} was not written: {error}") from error
    finally:
        for parent in new_parents:
            with suppress(OSError):  # not empty, if all went well
                parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _take_place(partial: Path, output: Path, overwrite: bool) -> None:
    """Rename `partial` to `output`; what was there goes only once the new one stands."""
    _check_free(output, overwrite)  # once more: a conversion takes a while
    if not output.exists() or not any(output.iterdir()):
        partial.replace(output)  # which fails where something has just come to be
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    try:
        output.replace(old)
        partial.replace(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.replace(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def copy_companions(directory: Path, partial: Path) -> None:
    """Tokenizer, chat template, generation config and licence, byte for byte.

    Raises:
        ConversionError: for a tokenizer that transformers cannot load.
    """
    for pattern in COMPANIONS:
        for path in directory.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
    if not (partial / "generation_config.json").is_file():
        # Older checkpoints say in config.json how to generate, where transformers looks for it next.
        generation = GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True
        )
        (partial / "generation_config.json").write_text(generation.to_json_string())
    templates = directory / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, partial / templates.name)
    settings = (
        read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    )
    if "auto_map" in settings:
        _copy_code(settings["auto_map"], directory, partial)
    elif "tokenizer_class" not in settings and any(any(partial.glob(p)) for p in VOCABULARIES):
        # The class of an older tokenizer follows from the model type, which changes; saved again, it names itself.
        try:
            AutoTokenizer.from_pretrained(directory).save_pretrained(partial)
        except Exception as error:  # whatever tokenizers raise for files that are none
            raise ConversionError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def _copy_code(auto_map: Any, directory: Path, partial: Path) -> None:
    """The Python files of a tokenizer that brings its own class; a reference into another repository stays one."""
    classes = auto_map.get("AutoTokenizer", ()) if isinstance(auto_map, dict) else auto_map
    for name in {c.split(".")[0] for c in ([classes] if isinstance(classes, str) else classes) if c and "--" not in c}:
        if not (directory / f"{name}.py").is_file():
            raise ConversionError(f"the tokenizer in {directory} needs {name}.py, which is not there")
        for path in [directory / f"{name}.py", *map(Path, get_relative_import_files(directory / f"{name}.py"))]:
            shutil.copyfile(path, partial / path.name)
