"""The output directory: written beside its place, and there only when it is whole."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from .errors import ConversionError
from .source import COMPANIONS


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raises ConversionError where writing `output` would lose something."""
    here, there = output.resolve(), source.resolve()
    if here == there:
        raise ConversionError(f"source and output are the same directory: {here}")
    if here in there.parents or there in here.parents:
        raise ConversionError(f"source {there} and output {here} lie in each other")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConversionError(f"{output} is a file; give a directory to write")
    if any(output.iterdir()):
        if not overwrite:
            raise ConversionError(f"{output} exists and is not empty; pass --overwrite to replace it")
        if not (output / "config.json").is_file():
            raise ConversionError(f"{output} is not a checkpoint (no config.json), so --overwrite does not replace it")


@contextmanager
def written_beside(output: Path, size: int) -> Iterator[Path]:
    """A directory beside `output` that takes its name at the end, or vanishes.

    Raises:
        ConversionError: where the disk is too small or cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise ConversionError(f"the result takes {size:,} bytes, and {output.parent} has {free:,} free")
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            _take_place(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(f"no space left for {size:,} bytes beside {output}; nothing was kept") from error
        raise ConversionError(f"cannot write {output}: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _take_place(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`; what was there goes only once the new one stands."""
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent)) / output.name
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old.parent, ignore_errors=True)


def copy_companions(directory: Path, partial: Path) -> None:
    """Tokenizer, chat template, generation config and licence, byte for byte."""
    for pattern in COMPANIONS:
        for path in directory.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)
    templates = directory / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, partial / templates.name)
    settings = directory / "tokenizer_config.json"
    named = settings.is_file() and "tokenizer_class" in json.loads(settings.read_text())
    if not named and any(partial.glob("tokenizer*")) | any(partial.glob("vocab.*")):
        # The class of an older tokenizer follows from the model type, which changes; saved again, it names itself.
        AutoTokenizer.from_pretrained(directory).save_pretrained(partial)
