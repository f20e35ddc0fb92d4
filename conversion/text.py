"""Calibration text and its tokens."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .errors import ConversionError

PLAIN = (".txt", ".md", ".rst")
DEFAULT_TEXT = "Python's reference manual"
CHUNK = 32  # documents that are tokenised at once
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load(source: str | os.PathLike, option: str = "--calibration", streaming: bool = False) -> Any:
    """The rows of a data file or of an id of the Hub's datasets, as `datasets` has them.

    Args:
        source: a file; `id`, `id:configuration`, or either with the split that is meant, `id[validation]` (default:
            train).
        option: that named the source, for messages.
        streaming: whether rows are fetched as they are needed.

    Raises:
        ConversionError: where there are none.
    """
    path = Path(source)
    try:
        import datasets
    except ImportError as error:
        raise ConversionError(f"{option} {source} needs the datasets library: pip install datasets") from error
    kind = next((FORMATS[suffix] for suffix in reversed(path.suffixes) if suffix in FORMATS), None)
    if path.is_file() and not path.stat().st_size:
        raise ConversionError(f"{option} {source} is empty")
    if path.exists() and not (path.is_file() and kind):
        raise ConversionError(f"{option} {source} is none of {', '.join((*PLAIN, *FORMATS))}")
    try:
        if kind and path.is_file():
            return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        where, _, split = str(source).removesuffix("]").partition("[")
        name, _, configuration = where.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=streaming)
    except Exception as error:  # whatever a loader raises for what it cannot read or fetch
        raise ConversionError(f"{option} {source} cannot be read: {error}") from error


def is_plain(source: str | os.PathLike) -> bool:
    """Whether it is a file that is one document."""
    return Path(source).suffix in PLAIN and Path(source).is_file()


def documents(
    source: str | os.PathLike | None, column: str | None = None, option: str = "--calibration"
) -> Sequence[str]:
    """The documents of a text.

    Args:
        source: a text file, JSON lines, parquet or CSV (also compressed), or an id of the Hub's datasets. `None` is
            Python's own reference manual, which every installation carries: English technical prose, enough to try
            things out; text like the model's own is better.
        column: that holds the text. Default: "text", else the first that holds text.
        option: that named the source, for messages.

    Raises:
        ConversionError: where there is no such text.
    """
    if source is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if is_plain(source):
        return [Path(source).read_text(encoding="utf-8", errors="replace")]
    rows = load(source, option)
    candidates = [column] if column else ["text", *rows.column_names]
    found = next((c for c in candidates if c in rows.column_names and len(rows) and isinstance(rows[0][c], str)), None)
    if found is None:
        wanted = f"no column {column!r} of text" if column else "no text"
        raise ConversionError(f"{option} {source} has {wanted}; its columns: {', '.join(rows.column_names)}")
    return rows[found]  # read from disk row by row


def pairs(
    source: str | os.PathLike | None, columns: Sequence[str], option: str = "--calibration"
) -> tuple[Sequence[str], Sequence[str]] | None:
    """The texts that an encoder reads and a decoder writes, or `None` where there is one text only.

    Args:
        source: as in [`documents`].
        columns: of the two. Default: those of "translation", as the Hub's data sets of translations have them; also
            where the columns named are languages in there.
        option: that named the source, for messages.

    Raises:
        ConversionError: where the columns do not exist.
    """
    if source is None or is_plain(source):
        if len(columns) == 2:
            raise ConversionError(f"{option} needs a data set with the columns {', '.join(columns)}; got {source}")
        return None
    if len(columns) == 1:
        return None
    rows = load(source, option)
    nested = "translation" in rows.column_names
    known = list(rows[0]["translation"]) if nested and len(rows) else rows.column_names
    if not columns and not nested:
        return None
    chosen = columns or known[:2]
    missing = [name for name in chosen if name not in known]
    if missing or not len(rows):
        raise ConversionError(f"{option} {source} has no column {missing}; its columns: {', '.join(known)}")
    if nested:
        both = rows["translation"]
        return [row[chosen[0]] for row in both], [row[chosen[1]] for row in both]
    return rows[chosen[0]], rows[chosen[1]]


def token_rows(
    texts: Sequence[str], tokenizer: Any, length: int, count: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Token ids [N, length] of documents in an order drawn by `seed`, one after another, each ended by eos.

    Args:
        texts: the documents.
        tokenizer: of transformers.
        length: of a row; what does not fill the last one is left out.
        count: tokens wanted; fewer documents give fewer. Default: all.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[torch.Tensor] = []
    total = 0
    for chunk in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).split(CHUNK):
        batch = tokenizer([texts[i] for i in chunk.tolist()], verbose=False).input_ids
        pieces += [torch.tensor(ids + end, dtype=torch.int32) for ids in batch]
        total += sum(len(ids) + len(end) for ids in batch)
        if count is not None and total >= count:
            break
    tokens = torch.cat([torch.empty(0, dtype=torch.int32), *pieces])[:count]
    rows = len(tokens) // length
    return tokens[: rows * length].view(rows, length)


def load_tokenizer(checkpoint: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint, a directory or a hub id; raises ConversionError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except Exception as error:  # whatever tokenizers raise for files that are none
        raise ConversionError(f"{checkpoint} has no tokenizer that can be loaded: {error}") from error


def check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    if int(tokens.max()) >= vocab_size:
        raise ConversionError(f"the tokenizer gives ids up to {int(tokens.max())}; the model has {vocab_size}")


def calibration_tokens(
    directory: Path,
    source: str | os.PathLike | None,
    count: int,
    length: int,
    vocab_size: int,
    seed: int,
    column: str | None = None,
) -> torch.Tensor:
    """Token ids [N, length] of a calibration text; see [`documents`] and [`token_rows`].

    Args:
        directory: of the checkpoint whose tokenizer is used.
        source, column, count, length, seed: as there.
        vocab_size: of the model, which every id must be below.

    Raises:
        ConversionError: where there is no tokenizer, too little text, or an id that the model does not have.
    """
    tokens = token_rows(documents(source, column), load_tokenizer(directory), length, count, seed).long()
    if len(tokens) < 2:
        raise ConversionError(
            f"the calibration text gives less than {2 * length} tokens; at least two sequences of {length} are needed"
        )
    check_ids(tokens, vocab_size)
    return tokens


def sentinel_ids(tokenizer: Any) -> list[int]:
    """The ids of T5's sentinels, where the tokenizer has them."""
    found = (tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(100))
    return [i for i in found if i and i != tokenizer.unk_token_id]


def corrupt_spans(
    ids: list[int], sentinels: Sequence[int], generator: torch.Generator, rate: float = 0.15, span: float = 3.0
) -> tuple[list[int], list[int]]:
    """Span corruption (T5, arXiv 1910.10683, section 3.1.4): spans replaced by sentinels, and what they hid.

    Args:
        ids: of a text.
        sentinels: ids of the sentinels, in order.
        rate, span: share of tokens that are hidden, and mean length of a span.
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
    """[N, T] of rows of any lengths, padded on the right, and which tokens are none of the padding."""
    length = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


def seq2seq_tokens(
    directory: Path,
    source: str | os.PathLike | None,
    columns: Sequence[str],
    count: int,
    length: int,
    config: Any,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibration tokens of an encoder-decoder model: source [N, S] and the decoder's input [N, T], each with which of
    its tokens are no padding.

    Pairs of texts are taken as they are. Of one text, spans are hidden where the tokenizer has sentinels (T5), else
    the decoder writes what the encoder reads.

    Args:
        directory, source, columns, seed: see [`calibration_tokens`] and [`pairs`].
        count: tokens wanted, of both sides together.
        length: most tokens of a side.
        config: `MQASeq2SeqConfig` of the model.
    """
    tokenizer = load_tokenizer(directory)
    generator = torch.Generator().manual_seed(seed)
    two = pairs(source, columns)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    total = 0
    if two is None:
        sentinels = sentinel_ids(tokenizer)
        texts = documents(source, columns[0] if columns else None)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for row in token_rows(texts, tokenizer, length - 2, count, seed).tolist():
            if len(sentinels) > 1:
                one, other = corrupt_spans(row, sentinels, generator)
                one, other = one + end, other + end
            else:
                one = other = tokenizer.build_inputs_with_special_tokens(row) if not end else row + end
            sources.append(one)
            targets.append(other)
    else:
        for chunk in torch.randperm(len(two[0]), generator=generator).split(CHUNK):
            texts, goals = ([side[i] for i in chunk.tolist()] for side in two)
            options = {"truncation": True, "max_length": length, "verbose": False}
            batch = tokenizer(texts, **options).input_ids, tokenizer(text_target=goals, **options).input_ids
            kept = [(one, other) for one, other in zip(*batch) if len(one) > 1 and len(other) > 1]
            sources += [one for one, _ in kept]
            targets += [other for _, other in kept]
            total += sum(len(one) + len(other) for one, other in kept)
            if total >= count:
                break
    if len(sources) < 2:
        raise ConversionError(
            f"the calibration text gives {len(sources)} examples; at least two are needed, of {length} tokens where "
            "they are not pairs"
        )
    pad = config.pad_token_id or 0
    start = config.decoder_start_token_id
    if start is None:
        raise ConversionError("config.json has no decoder_start_token_id, which the decoder's input begins with")
    longest = config.decoder.max_position_embeddings
    read, read_valid = padded(sources, pad)
    written, written_valid = padded([[start, *row][:longest] for row in targets], pad)
    check_ids(read, config.encoder.vocab_size)
    check_ids(written, config.decoder.vocab_size)
    return read, read_valid, written, written_valid
