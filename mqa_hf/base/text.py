"""Calibration text and its tokens."""

import codecs
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .chats import Document, Form, form_of, holds_chats, holds_text
from .console import NORMAL, verbosity
from .errors import MQAError
from .mixture import BUILT_IN, MANUAL

PLAIN = (".txt", ".md", ".rst")
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load(source: str | os.PathLike, option: str = "`calibration`", streaming: bool = False) -> Any:
    """Load the rows of a data file or a data set on the Hub with `datasets`.

    Args:
        source: a file; `id` or `id:configuration`, with an optional split such as `id[validation]` (default: train).
        option: name of the option, for messages.
        streaming: whether to fetch rows on demand.

    Raises:
        MQAError: if it cannot be read.
    """
    path = Path(source)
    try:
        import datasets
    except ImportError as error:
        raise MQAError(f"{option} {source} needs the datasets library: pip install datasets") from error
    check_file(source, option)
    kind = format_of(path)
    if verbosity() < NORMAL:
        datasets.disable_progress_bars()
    try:
        if kind and path.is_file():
            return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        where, _, split = str(source).removesuffix("]").partition("[")
        name, _, configuration = where.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=streaming)
    except Exception as error:  # loaders raise any type
        raise MQAError(f"{option} {source} cannot be read: {error.__cause__ or error}") from error


def format_of(path: Path) -> str | None:
    """The loader of `datasets` for a data file, also if compressed; `None` for other names."""
    return next((FORMATS[suffix] for suffix in reversed(path.suffixes) if suffix in FORMATS), None)


def check_source(source: str, option: str) -> None:
    """Raise MQAError for a text that is not built in and not a file that can be read; ids on the Hub pass."""
    if not is_built_in(source, option):
        check_file(source, option)


def check_file(source: str | os.PathLike, option: str) -> None:
    """Raise MQAError for a missing or empty file or an unknown format; ids on the Hub pass."""
    path = Path(source)
    if path.is_dir():
        raise MQAError(f"{option} {source} is a directory; give a file")
    known = path.suffix in PLAIN or format_of(path) is not None
    if not path.exists():
        # An id on the Hub is NAME or OWNER/NAME, with an optional configuration or split.
        owner_and_name = str(source).partition(":")[0].count("/") <= 1
        if known or path.is_absolute() or str(source).startswith((".", "~")) or not owner_and_name:
            raise MQAError(f"{option} {source} does not exist")
        return
    if path.is_file() and not path.stat().st_size and path.suffix not in PLAIN:
        raise MQAError(f"{option} {source} is empty")
    if not (path.is_file() and known):
        raise MQAError(f"{option} {source} must be one of {', '.join((*PLAIN, *FORMATS))}")


def is_built_in(source: Any, option: str = "`calibration`") -> bool:
    """Whether it is one of [`mixture.BUILT_IN`]; raises MQAError for unknown names of that kind."""
    if not str(source).startswith("builtin:"):
        return False
    if source not in BUILT_IN:
        raise MQAError(f"{option} {source} is not one of {', '.join(BUILT_IN)}")
    return True


def has_columns(source: Any, option: str = "`calibration`") -> bool:
    """Whether it is a data set, not a plain or a built-in text."""
    return not is_built_in(source, option) and not is_plain(source)


def is_plain(source: str | os.PathLike) -> bool:
    """Whether it is a plain text file, which is one document."""
    return Path(source).suffix in PLAIN and Path(source).is_file()


class Texts(Sequence[str]):
    """The texts of rows, read on demand; "" for rows without text."""

    def __init__(self, rows: Any, form: Form, name: str, tokenizer: Any = None):
        """`name` is for messages; `tokenizer` has the template of chats."""
        self.rows, self.form, self.name, self.tokenizer = rows.select_columns(form.columns), form, name, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.document(index, False).text

    def document(self, index: int, answers: bool = True) -> Document:
        """The text of a row and the answers in it, if these are sought."""
        try:
            row = self.rows[index]
        except IndexError:
            raise
        except Exception as error:  # such as invalid UTF-8
            raise MQAError(f"{self.name} cannot be read, row {index}: {error}") from error
        return self.form.read(row, self.tokenizer, answers)


def features_of(rows: Any) -> Any:
    """Columns and their types; for a stream without types, those of its first rows."""
    if rows.features is not None:
        return rows.features
    import datasets

    return datasets.Dataset.from_list(list(rows.take(100))).features


def no_text(
    source: str | os.PathLike, option: str, columns: Sequence[str], known: Mapping[str, Any] | Sequence[str]
) -> MQAError:
    """The error for a data set without such a column of text; `known` are its columns, with their types if known."""
    named = f"no column {', '.join(map(repr, columns))} of text" if columns else "no column of text"
    several = not columns and any(map(holds_text, known.values() if isinstance(known, Mapping) else ()))
    said = "several columns and none that is known by its name; name those to read" if several else named
    kinds = known if isinstance(known, Mapping) else {}
    shown = [f"{name} ({kind_of(kinds[name])})" if name in kinds else name for name in known]
    return MQAError(f"{option} {source} has {said}; its columns: {', '.join(shown)}")


def kind_of(feature: Any) -> str:
    """The type of a column in a word: int64, string, list, struct."""
    if isinstance(feature, dict):
        return "struct"
    inner = getattr(feature, "dtype", None)
    return inner if isinstance(inner, str) else type(feature).__name__.lower()


def given_texts(source: Any, option: str) -> Sequence[str] | None:
    """The texts, if `source` is a list of them; raises MQAError for a list of anything else."""
    if source is None or isinstance(source, str | os.PathLike):
        return None
    if not isinstance(source, Sequence) or not all(isinstance(text, str) for text in source):
        raise MQAError(f"{option} must be a list of texts; got {str(source)[:80]!r}")
    for number, text in enumerate(source):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MQAError(f"{option}: text {number} has a lone surrogate at {error.start:,}; remove it") from None
    return source


def documents(
    source: str | os.PathLike | Sequence[str] | None,
    columns: Sequence[str] = (),
    option: str = "`calibration`",
    tokenizer: Any = None,
) -> Sequence[str]:
    """The documents of a text.

    Args:
        source: a text file, JSON lines, parquet or CSV (also compressed), an id of the Hub's datasets, or one of
            [`mixture.BUILT_IN`]. Default: `builtin:manual`. A list of texts is taken as it is.
        columns: as in [`form_of`]. Default: as there, else the only column with text.
        option: name of the option, for messages.
        tokenizer: for the template of chats.

    Raises:
        MQAError: if there is no such text.
    """
    given = given_texts(source, option)
    if given is not None:
        if columns:
            raise MQAError(f"{option} is a list of texts, without columns; got {', '.join(columns)}")
        return given
    source = MANUAL if source is None else source
    assert isinstance(source, str | os.PathLike)
    if not has_columns(source, option):
        if columns:
            raise MQAError(f"{option} {source} is text without columns; got {', '.join(columns)}")
        return [read_plain(source, option)] if is_plain(source) else BUILT_IN[str(source)]()
    rows = load(source, option)
    features = features_of(rows)
    if not len(rows):
        raise MQAError(f"{option} {source} has no rows")
    form = form_of(features, columns)
    if form is None and not columns:
        read = [name for name, feature in features.items() if holds_text(feature) or holds_chats(feature)]
        form = Form("text", (read[0],)) if len(read) == 1 and holds_text(features[read[0]]) else None
    if form is None:
        raise no_text(source, option, columns, features)
    check_template(form, tokenizer, f"{option} {source}")
    return Texts(rows, form, f"{option} {source}", tokenizer)


def check_template(form: Form, tokenizer: Any, name: str) -> None:
    """Raise MQAError if rows of this form need a chat template and there is no tokenizer."""
    if form.kind in ("chat", "instruction") and tokenizer is None:
        raise MQAError(
            f"{name}: {', '.join(form.columns)} hold chats, which need a tokenizer with a chat template; pass "
            "`tokenizer`"
        )


def read_plain(source: str | os.PathLike, option: str) -> str:
    """Read a text file in UTF-8, or UTF-16 with a byte order mark; raises MQAError for other encodings."""
    encoding = "utf-8"
    try:
        content = Path(source).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        elif content.startswith(codecs.BOM_UTF8):
            encoding = "utf-8-sig"
        text = content.decode(encoding)
    except OSError as error:
        raise MQAError(f"{option} {source} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        raise MQAError(
            f"{option} {source} is not {encoding.upper().removesuffix('-SIG')} at byte {at:,}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def pairs(
    source: str | os.PathLike | Sequence[str] | None, columns: Sequence[str], option: str = "`calibration`"
) -> tuple[Sequence[str], Sequence[str]] | None:
    """The texts that an encoder reads and a decoder writes, or `None` if there is only one text.

    Args:
        source: as in [`documents`].
        columns: names of the two columns, or of two languages in a column "translation", as data sets on the Hub have
            it. Default: the two languages of "translation".
        option: name of the option, for messages.

    Raises:
        MQAError: if the columns do not exist or hold no text.
    """
    if len(columns) > 2:
        raise MQAError(f"an encoder-decoder model takes one or two columns; got {', '.join(columns)}")
    given = given_texts(source, option)
    if given is not None or source is None or is_plain(source):  # type: ignore[arg-type]
        if len(columns) == 2:
            got = source if given is None else "a list of texts"
            raise MQAError(f"{option} needs a data set with the columns {', '.join(columns)}; got {got}")
        return None
    assert isinstance(source, str | os.PathLike)
    if len(columns) == 1:
        return None
    rows = load(source, option)
    nested = "translation" in rows.column_names
    if not columns and not nested:
        return None
    inside = "translation." if nested else ""
    rows = rows.flatten() if nested else rows
    known = [name.removeprefix(inside) for name in rows.column_names if name.startswith(inside)]
    chosen = columns or known[:2]
    if not len(rows):
        raise MQAError(f"{option} {source} has no rows")
    wrong = [name for name in chosen if name not in known or not holds_text(rows.features[inside + name])]
    if wrong or len(chosen) < 2:
        raise no_text(source, option, wrong, {name: rows.features[inside + name] for name in known})
    one, other = (Texts(rows, Form("text", (inside + name,)), f"{option} {source}") for name in chosen)
    return one, other


def load_tokenizer(checkpoint: str | os.PathLike, revision: str | None = None) -> Any:
    """Load the tokenizer of a directory or hub id; raises MQAError if that fails."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except Exception as error:  # tokenizers raise any type
        raise MQAError(f"{checkpoint} has no tokenizer that can be loaded: {error}") from error


def load_processor(checkpoint: str | os.PathLike) -> Any:
    """Load the processor of a speech model; raises MQAError if that fails."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(checkpoint)
        extractor = processor.feature_extractor
        assert min(extractor.sampling_rate, extractor.n_samples) > 0
    except Exception as error:  # transformers raises anything for invalid files
        raise MQAError(f"{checkpoint} has no speech processor that can be loaded: {error}") from error
    return processor
