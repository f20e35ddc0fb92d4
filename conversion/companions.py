"""Files of a checkpoint other than its weights: copied from the source, then loaded from the result as a check."""

import copy
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_imports

from mqa_hf.base.errors import ConversionError
from mqa_hf.base.files import read_json
from mqa_hf.base.hub import CHAT_TEMPLATES, COMPANIONS
from mqa_hf.base.text import load_processor, load_tokenizer

from .source import load_config

PASSED_ON = ("config.json", "README.md")  # read rather than copied
VOCABULARIES = ("tokenizer.*", "tokenizer_config.json", "vocab.*", "*.model", "*.spm", "*.tiktoken")
PROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
# Settings files that may name classes in code, and the auto classes.
CODED = {
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
    "processor_config.json": ("AutoProcessor",),
    PROCESSOR: ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor"),
}


def inside(directory: Path, path: Path) -> Path:
    """Resolve a file of a checkpoint, which must be in its directory or among its repository's blobs in the Hub cache.

    Used for all files that are copied or quoted. Only weights may link elsewhere, as large files are often on another
    disk; they are never copied, but read as tensors with the names and shapes of the model.

    Raises:
        ConversionError: if it is outside of the directory.
    """
    try:
        root, found = directory.resolve(), path.resolve()
        dangling = path.is_symlink() and not found.exists()
    except (OSError, RuntimeError, ValueError) as error:  # the latter two for loops of links and impossible names
        raise ConversionError(f"{str(path)!r} cannot be read: {error}") from error
    repositories = [p.parent for p in root.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    if root not in found.parents and found.parent not in [repository / "blobs" for repository in repositories]:
        raise ConversionError(
            f"{path} links to {found}, outside of the checkpoint, which is not copied; put the file itself into "
            f"{root}, or remove the link"
        )
    if dangling:
        raise ConversionError(f"{path} links to {found}, which does not exist")
    return found


def copy_files(directory: Path, paths: Iterable[Path], partial: Path) -> None:
    """Copy the paths that are files; raises ConversionError as [`inside`] does."""
    for path in paths:
        found, place = inside(directory, path), partial / path.relative_to(directory)
        if found.is_file():
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(found, place)


def copy_companions(directory: Path, partial: Path) -> None:
    """Tokenizer with its code, processor, chat templates, generation config and licence, byte for byte.

    Raises:
        ConversionError: for files that transformers cannot load or that are outside of the source.
    """
    for name in PASSED_ON:
        inside(directory, directory / name)
    # Not with `glob`, which skips dangling links.
    paths = (*directory.iterdir(), *directory.glob(CHAT_TEMPLATES))
    copy_files(directory, (path for path in paths if any(path.match(pattern) for pattern in COMPANIONS)), partial)
    for name in ("tokenizer.json", "tokenizer_config.json", *(n for n in COMPANIONS if n.endswith(".json"))):
        if (partial / name).is_file():
            read_json(directory / name)  # its errors are clearer than those of the classes that read it
    for name in CODED:
        for module, path in _code(_references(directory / name), directory).items():
            shutil.copyfile(path, partial / f"{Path(module).name}.py")
    config = load_config(directory)
    if not (partial / GENERATION).is_file():
        (partial / GENERATION).write_text(generation_of(directory).to_json_string())
    for what, auto in load_parts(partial, config):
        with loading(f"the {what} in {directory}"):
            auto.from_pretrained(partial, config=config, trust_remote_code=False)


def generation_of(directory: Path) -> GenerationConfig:
    """The generation configuration of a checkpoint; older ones have it in config.json."""
    name = GENERATION if (directory / GENERATION).is_file() else "config.json"
    with loading(f"the generation configuration in {directory / name}"):
        return GenerationConfig.from_pretrained(
            directory, config_file_name=name, _from_model_config=name == "config.json"
        )


def check_loads(partial: Path, directory: Path) -> None:
    """Load everything but the weights from a result, without running its code.

    The class of a tokenizer or processor may depend on the model type, which changes. If the result's class then
    differs from the source's, it is saved again, which records its class.

    Args:
        partial: the result.
        directory: the source.

    Raises:
        ConversionError: if a file does not load or code is missing.
    """
    load_settings(partial)
    config = load_config(directory)
    for what, auto in load_parts(partial, config):
        with loading(f"the {what} of the result"):
            theirs = auto.from_pretrained(partial, config=copy.deepcopy(config), trust_remote_code=False)
            ours = auto.from_pretrained(partial, trust_remote_code=False)
            if not same_class(ours, theirs):
                theirs.save_pretrained(partial)
                ours = auto.from_pretrained(partial, trust_remote_code=False)
        if not same_class(ours, theirs):
            raise ConversionError(
                f"the {what} in {directory}, a {type(theirs).__name__}, loads from the result as a different "
                f"{type(ours).__name__}; save it again with save_pretrained and convert that"
            )


def load_settings(partial: Path) -> None:
    """Load the configurations of a result and check that its code is complete."""
    load_config(partial)
    for name in ("config.json", *CODED):
        _code(_references(partial / name), partial)
    with loading("the generation configuration of the result"):
        GenerationConfig.from_pretrained(partial)


@dataclass(frozen=True)
class Beside:
    """The files beside the weights of a checkpoint."""

    directory: Path

    def carry_over(self, partial: Path) -> None:
        """Copy the files to a result."""
        copy_companions(self.directory, partial)

    def check(self, partial: Path) -> None:
        """Load the written files; raises ConversionError if they load as another class."""
        check_loads(partial, self.directory)

    def doubts(self) -> list[str]:
        """Files that were not checked, a sentence each."""
        return not_looked_at(self.directory)

    def generation(self) -> GenerationConfig:
        return generation_of(self.directory)

    def tokenizer(self) -> Any:
        """The tokenizer for calibration texts; raises MQAError without one."""
        return load_tokenizer(self.directory)

    def processor(self) -> Any:
        """The processor for recordings; raises MQAError without one."""
        return load_processor(self.directory)

    @property
    def card(self) -> Path | None:
        """The directory of the model card to copy from."""
        path = inside(self.directory, self.directory / "README.md")
        return path if path.is_file() else None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn any error of transformers' classes into "`what` cannot be loaded"."""
    try:
        yield
    except Exception as error:  # transformers' classes raise any type
        said = " ".join(str(error).split()) or "no reason given"
        raise ConversionError(f"{what} cannot be loaded: {type(error).__name__}: {said}") from error


def not_looked_at(directory: Path) -> list[str]:
    """Files that are copied without being loaded, a sentence each."""
    pieces, lacks = lacking_sentencepiece(directory), lacking(directory, load_config(directory))
    found = [f"the tokenizer was copied unchecked: {pieces} needs sentencepiece, which is not installed"]
    return [*(found if pieces else []), *([f"the processor was copied unchecked: {lacks}"] if lacks else [])]


def lacking_sentencepiece(directory: Path) -> str | None:
    """The file of a tokenizer that only sentencepiece reads, if that is not installed."""
    pieces = [path.name for pattern in ("*.spm", "*.model") for path in directory.glob(pattern)]
    if not pieces or (directory / "tokenizer.json").is_file() or find_spec("sentencepiece") is not None:
        return None
    return pieces[0]


def lacking(directory: Path, config: Any) -> str | None:
    """What a processor needs that is not installed (Pillow, torchvision), as transformers says it."""
    part = processor_of(directory)
    if part is None:
        return None
    try:
        part[1].from_pretrained(directory, config=copy.deepcopy(config), trust_remote_code=False)
    except ImportError as error:
        return next(line.strip() for line in f"{error}".splitlines() if line.strip()).rstrip(".")
    except Exception:  # reported when it is loaded to be checked
        return None
    return None


def speaks(directory: Path) -> bool:
    """Whether there is a tokenizer; a trainer given only the feature extractor saves none."""
    return any(any(directory.glob(pattern)) for pattern in VOCABULARIES)


def processor_of(directory: Path) -> tuple[str, Any] | None:
    """Name and auto class of the processor, if present and without own code."""
    if not (directory / PROCESSOR).is_file() or any(_references(directory / name) for name in CODED):
        return None
    return ("processor", AutoProcessor) if speaks(directory) else ("feature extractor", AutoFeatureExtractor)


def load_parts(directory: Path, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and auto classes of tokenizer and processor, if present, without own code, and loadable with
    what is installed."""
    if lacking_sentencepiece(directory) is not None:
        return
    if speaks(directory) and not _references(directory / "tokenizer_config.json"):
        yield "tokenizer", AutoTokenizer
    part = processor_of(directory)
    if part is not None and lacking(directory, config) is None:
        yield part


def same_class(one: Any, other: Any) -> bool:
    """Whether two tokenizers or processors have the same class or, if fast tokenizers, the same backend."""
    if isinstance(one, PreTrainedTokenizerFast) and isinstance(other, PreTrainedTokenizerFast):
        return one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    return type(one) is type(other)


def _references(path: Path) -> list[str]:
    """Classes in code that a settings file names: `module.Class` or `repository--module.Class`."""
    said = read_json(path).get("auto_map", {}) if path.is_file() else {}
    if isinstance(said, dict):
        said = [value for auto, value in said.items() if auto in CODED.get(path.name, said)]
    elif isinstance(said, list):  # the format of old tokenizers
        said = [said]
    else:
        said = [[0]]
    classes = [c for value in said for c in (value if isinstance(value, list) else [value]) if c is not None]
    if not all(isinstance(c, str) and "." in c for c in classes):
        raise ConversionError(f'{path}: auto_map names no classes, such as {{"AutoTokenizer": "module.Class"}}')
    return classes


def _code(classes: Iterable[str], directory: Path) -> dict[str, Path]:
    """The modules of classes and of their relative imports, with their files in `directory`.

    Classes of other repositories are not followed.

    Raises:
        ConversionError: for a file that is missing or outside of the directory.
    """
    waiting, found = [c.rpartition(".")[0] for c in classes if "--" not in c], dict[str, Path]()
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        path = found[module] = inside(directory, directory / f"{module}.py")
        if not path.is_file():
            raise ConversionError(f"the code in {directory} needs {module}.py, which is missing")
        try:
            waiting += get_relative_imports(path)
        except (OSError, ValueError) as error:
            raise ConversionError(f"{directory / module}.py cannot be read: {error}") from error
    return found
