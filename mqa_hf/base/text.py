"""Calibration text and its tokens."""

import codecs
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .chats import Document, Form, form_of, holds_text
from .console import NORMAL, verbosity
from .errors import MQAError
from .mixture import BUILT_IN, MANUAL, Part, shares

PLAIN = (".txt", ".md", ".rst")
CHUNK = 32  # documents that are tokenised at once
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
    if built_in(source, option) is None:
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


def built_in(source: Any, option: str = "`calibration`") -> list[str] | None:
    """The documents of one of [`mixture.BUILT_IN`]; `None` for other sources, MQAError for unknown names."""
    if not str(source).startswith("builtin:"):
        return None
    if source not in BUILT_IN:
        raise MQAError(f"{option} {source} is not one of {', '.join(BUILT_IN)}")
    return BUILT_IN[source]()


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
        return self.document(index).text

    def document(self, index: int) -> Document:
        """The text of a row and the answers in it."""
        try:
            row = self.rows[index]
        except IndexError:
            raise
        except Exception as error:  # such as invalid UTF-8
            raise MQAError(f"{self.name} cannot be read, row {index}: {error}") from error
        return self.form.read(row, self.tokenizer)


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
    said = f"no column {', '.join(map(repr, columns))} of text" if columns else "no column of text"
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
        columns: as in [`form_of`]. Default: as there, else the first column with text.
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
    known = built_in(source, option)
    if known is not None or is_plain(source):
        if columns:
            raise MQAError(f"{option} {source} is text without columns; got {', '.join(columns)}")
        return [read_plain(source, option)] if known is None else known
    rows = load(source, option)
    features = features_of(rows)
    if not len(rows):
        raise MQAError(f"{option} {source} has no rows")
    form = form_of(features, columns)
    if form is None and not columns:
        name = next((name for name in features if holds_text(features[name])), None)
        form = None if name is None else Form("text", (name,))
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


def token_rows(
    texts: Sequence[str], tokenizer: Any, length: int, count: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Token ids [N, length] of documents in an order drawn by `seed`, one after another, each ended by eos.

    Args:
        texts: the documents.
        tokenizer: a transformers tokenizer.
        length: tokens per row; an incomplete last row is dropped.
        count: maximum number of tokens. Default: all.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[torch.Tensor] = []
    total = 0
    for chunk in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).split(CHUNK):
        some = [text for text in (texts[i] for i in chunk.tolist()) if text]
        batch = tokenizer(some, verbose=False).input_ids if some else []
        pieces += [torch.tensor(ids + end, dtype=torch.int32) for ids in batch]
        total += sum(len(ids) + len(end) for ids in batch)
        if count is not None and total >= count:
            break
    tokens = torch.cat([torch.empty(0, dtype=torch.int32), *pieces])[:count]
    rows = len(tokens) // length
    return tokens[: rows * length].view(rows, length)


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


def check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    if int(tokens.max()) >= vocab_size:
        raise MQAError(f"the tokenizer gives ids up to {int(tokens.max())}, but the model has {vocab_size} embeddings")


def calibration_tokens(
    tokenizer: Any,
    source: str | os.PathLike | Sequence[str] | None,
    count: int,
    length: int,
    vocab_size: int,
    seed: int,
    columns: Sequence[str] = (),
) -> torch.Tensor:
    """Token ids [N, length] of a calibration text; see [`documents`] and [`token_rows`].

    Args:
        tokenizer: a transformers tokenizer.
        source, columns, count, length, seed: as there.
        vocab_size: vocabulary size of the model.

    Raises:
        MQAError: if there is too little text, or an id outside the model's vocabulary.
    """
    tokens = token_rows(documents(source, columns, tokenizer=tokenizer), tokenizer, length, count, seed).long()
    if len(tokens) < 2:
        raise MQAError(
            f"the calibration text has fewer than {2 * length} tokens; give at least two sequences of {length}"
        )
    check_ids(tokens, vocab_size)
    return tokens


def mixed_tokens(
    tokenizer: Any,
    parts: Sequence[Part] | Sequence[str],
    count: int,
    length: int,
    vocab_size: int,
    seed: int,
    columns: Sequence[str] = (),
) -> list[torch.Tensor]:
    """Token ids [N, length] of each part of a calibration mixture (or of a list of texts), about `count` in all,
    divided by weight; what a short part lacks is divided among the others.

    Raises:
        MQAError: if a part has not two sequences, or an id is outside the model's vocabulary.
    """
    mixed = [part for part in parts if isinstance(part, Part)]
    if len(mixed) < 2:
        source: Any = mixed[0].source if mixed else parts
        return [calibration_tokens(tokenizer, source, count, length, vocab_size, seed, columns)]
    wanted = shares(mixed, count // length)
    texts = {}
    for part, rows in zip(mixed, wanted):
        if rows:
            own = columns if built_in(part.source) is None and not is_plain(part.source) else ()
            texts[part] = documents(part.source, own, tokenizer=tokenizer)
    found: dict[Part, torch.Tensor] = {}
    left, open_parts = count // length, dict(zip(mixed, wanted))
    while open_parts:
        short = []
        for part, rows in open_parts.items():
            if part in texts:
                found[part] = token_rows(texts[part], tokenizer, length, rows * length, seed).long()
                short += [part] if len(found[part]) < rows else []
        if not short or len(short) == len(open_parts):
            break
        left -= sum(len(found[part]) for part in short)
        rest = [part for part in open_parts if part not in short]
        open_parts = dict(zip(rest, shares(rest, left)))
    for part, tokens in found.items():
        if not len(tokens):
            raise MQAError(f"`calibration` {part.source} has fewer than {length} tokens, one sequence")
        check_ids(tokens, vocab_size)
    return list(found.values())


def check_count(count: int, length: int) -> None:
    """Raise MQAError for fewer than two sequences of `length` tokens: one to fit on, one held out."""
    if count < 2 * length:
        raise MQAError(
            f"`calibration_tokens` must be at least two sequences of {length:,} tokens, got {count:,}; raise it to "
            f"{2 * length:,} or lower `sequence_length`"
        )


def sentinel_ids(tokenizer: Any) -> list[int]:
    """The ids of T5's sentinels, if the tokenizer has them."""
    found = (tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(100))
    return [i for i in found if i and i != tokenizer.unk_token_id]


def corrupt_spans(
    ids: list[int], sentinels: Sequence[int], generator: torch.Generator, rate: float = 0.15, span: float = 3.0
) -> tuple[list[int], list[int]]:
    """Span corruption (T5, arXiv 1910.10683, section 3.1.4): spans replaced by sentinels, and what they hid.

    Args:
        ids: of a text.
        sentinels: ids of the sentinels, in order.
        rate, span: share of hidden tokens, and mean length of a span.
    """
    count = min(max(1, round(len(ids) * rate / span)), len(sentinels) - 1, max(1, len(ids) // 2))
    starts = torch.randperm(len(ids), generator=generator)[:count].sort().values.tolist()
    lengths = torch.randint(1, round(2 * span), (count,), generator=generator).tolist()
    source, target, at = [], [], 0
    for sentinel, start, length in zip(sentinels, starts, lengths):
        if start < at:
            continue
        source += [*ids[at:start], sentinel]
        target += [sentinel, *ids[start : start + length]]
        at = start + length
    return source + ids[at:], [*target, sentinels[count]]


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T]: rows padded on the right, and a mask of the tokens that are not padding."""
    length = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


def seq2seq_tokens(
    tokenizer: Any,
    parts: Sequence[Part] | Sequence[str],
    columns: Sequence[str],
    count: int,
    length: int,
    config: Any,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Calibration tokens of an encoder-decoder model: source [N, S] and the decoder's input [N, T], each with a mask
    of the tokens that are not padding, and the number of examples of each part.

    Args:
        tokenizer, columns, seed: see [`calibration_tokens`] and [`pairs`].
        parts: a mixture, or a list of texts.
        count: maximum number of tokens, both sides together, divided by weight.
        length: maximum number of tokens per side.
        config: `MQASeq2SeqConfig` of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    counts: list[int] = []
    for source, share in divided(parts, count):
        one, other = examples_of(tokenizer, source, columns, share, length, generator, seed)
        sources, targets, counts = sources + one, targets + other, [*counts, len(one)]
    if len(sources) < 2:
        raise MQAError(
            f"the calibration text has {len(sources)} examples; give at least two, of {length} tokens if they are "
            f"not pairs"
        )
    pad = config.pad_token_id or 0
    start = config.decoder_start_token_id
    if start is None:
        raise MQAError("config.json has no decoder_start_token_id, the first token of the decoder's input")
    longest = config.decoder.max_position_embeddings
    read, read_valid = padded(sources, pad)
    written, written_valid = padded([[start, *row][:longest] for row in targets], pad)
    check_ids(read, config.encoder.vocab_size)
    check_ids(written, config.decoder.vocab_size)
    return read, read_valid, written, written_valid, counts


def divided(parts: Sequence[Part] | Sequence[str], count: int) -> Iterator[tuple[str | Sequence[str], int]]:
    """The sources of a mixture with their shares of `count`; a list of texts is one source."""
    mixed = [part for part in parts if isinstance(part, Part)]
    if not mixed:
        yield parts, count  # type: ignore[misc]
    for part, share in zip(mixed, shares(mixed, count)):
        if share:
            yield part.source, share


def examples_of(
    tokenizer: Any,
    source: str | Sequence[str],
    columns: Sequence[str],
    count: int,
    length: int,
    generator: torch.Generator,
    seed: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids that the encoder reads and that the decoder writes, about `count` in all.

    Pairs of texts are used as they are. In a single text, spans are hidden if the tokenizer has sentinels (T5);
    otherwise the decoder writes what the encoder reads.
    """
    own = columns if isinstance(source, str) and built_in(source) is None else ()
    two = None if isinstance(source, str) and built_in(source) is not None else pairs(source, columns)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    total = 0
    if two is None:
        check_count(count, length - 2)
        sentinels = sentinel_ids(tokenizer)
        texts = documents(source, own, tokenizer=tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for row in token_rows(texts, tokenizer, length - 2, count, seed).tolist():
            if len(sentinels) > 1:
                one, other = corrupt_spans(row, sentinels, generator)
                one, other = one + end, other + end
            else:
                one = other = tokenizer.build_inputs_with_special_tokens(row) if not end else row + end
            sources.append(one)
            targets.append(other)
        return sources, targets
    for chunk in torch.randperm(len(two[0]), generator=generator).split(CHUNK):
        both = [(two[0][i], two[1][i]) for i in chunk.tolist()]
        texts, goals = ([pair[side] for pair in both if all(pair)] for side in (0, 1))
        if not texts:
            continue
        options = {"truncation": True, "max_length": length, "verbose": False}
        batch = tokenizer(texts, **options).input_ids, tokenizer(text_target=goals, **options).input_ids
        kept = [(one, other) for one, other in zip(*batch) if len(one) > 1 and len(other) > 1]
        sources += [one for one, _ in kept]
        targets += [other for _, other in kept]
        total += sum(len(one) + len(other) for one, other in kept)
        if total >= count:
            break
    return sources, targets
