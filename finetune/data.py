"""Training text: mixtures of data sets, packed into rows for a decoder or paired for an encoder-decoder model.

Everything is read through `datasets`: local text, JSON lines, parquet or CSV, or an id of the Hub, whole or streamed.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from mqa_hf.base.console import NORMAL, verbosity
from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import stamps
from mqa_hf.base.text import (
    chat_text,
    check_file,
    corrupt_spans,
    documents,
    features_of,
    holds_chats,
    holds_text,
    is_plain,
    load,
    no_text,
    one_column,
    sentinel_ids,
)
from mqa_hf.modeling_mqa_seq2seq import shift_right

from .options import Part, Training
from .order import check_rows

IGNORED = -100  # label of positions without a target in transformers
BATCH = 256  # documents tokenised at once
DATASET = "`dataset`"  # the option, for messages
BUFFER = 10_000  # shuffle buffer of a stream, in documents


def set_up_logs() -> None:
    """Disable progress bars of file access in other libraries, and all of them if the verbosity is `QUIET`."""
    import datasets

    logging.disable_progress_bar()
    if verbosity() < NORMAL:
        datasets.disable_progress_bars()


def open_dataset(source: str, streaming: bool = False, option: str = DATASET) -> Any:
    """The rows of a text file or of any source of [`load`]; `option` is for messages.

    Raises:
        MQAError: if it cannot be read.
    """
    if not is_plain(source):
        return load(source, option, streaming)
    import datasets

    whole = datasets.Dataset.from_list([{"text": documents(source, option=option)[0]}])
    return whole.to_iterable_dataset() if streaming else whole


def column_names(rows: Any) -> list[str]:
    return list(rows.column_names or next(iter(rows), {}))


def choose_columns(
    source: str, rows: Any, columns: Sequence[str], tokenizer: Any = None, option: str = DATASET
) -> Any:
    """The same rows with one column "text", or "source" and "target" if two columns are named.

    Columns may also be languages of "translation", as the Hub's data sets of translations have them. Chats become text
    by the template of the tokenizer.
    """
    import datasets

    features = reading(f"{option} {source}", features_of, rows)
    known = list(features)
    if "translation" in known and len(columns) == 2:
        one, other = columns
        inside = features["translation"]
        languages = list(inside) if isinstance(inside, dict) else list(getattr(inside, "languages", ()))
        if not set(columns) <= set(languages):
            raise MQAError(f"{option} {source} has translations in {', '.join(languages)}, not {one} and {other}")
        wrong = [name for name in columns if isinstance(inside, dict) and not holds_text(inside[name])]
        if wrong:
            raise no_text(source, option, wrong, languages)

        def sides(row: dict[str, Any]) -> dict[str, Any]:
            both = row["translation"] or {}
            return {"source": both.get(one), "target": both.get(other)}

        return rows.map(sides, remove_columns=known)
    wanted = list(columns) or ["text"]
    if len(wanted) == 1 and holds_chats(features.get(wanted[0])):
        (name,) = wanted
        if tokenizer is None:
            raise MQAError(
                f"{option} {source}: {name} holds chats, which need a tokenizer with a chat template; pass `tokenizer`"
            )

        def chat(row: dict[str, Any]) -> dict[str, str]:
            return {"text": chat_text(row[name], tokenizer)}

        text = datasets.Features({"text": datasets.Value("string")})
        return reading(f"{option} {source}", rows.map, chat, remove_columns=known, features=text)
    # A part of a mixture or the beginning of a stream may have no rows.
    wrong = [n for n in wanted if not holds_text(features.get(n)) and getattr(features.get(n), "dtype", "") != "null"]
    if wrong:
        raise no_text(source, option, wrong, features)
    names = ["text"] if len(wanted) == 1 else ["source", "target"]
    rows = rows.select_columns(wanted)
    for old, new in zip(wanted, names):
        rows = rows if old == new else rows.rename_column(old, new)
        rows = rows.cast_column(new, datasets.Value("string"))  # so that all parts have the same type
    return rows


def reading(name: str, read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of `read`; errors of reading become an MQAError."""
    try:
        return read(*args, **options)
    except (MQAError, StopIteration):
        raise
    except Exception as error:
        raise MQAError(f"{name} cannot be read: {error.__cause__ or error}") from error


def mixture(
    parts: Sequence[Part],
    columns: Sequence[str] = (),
    streaming: bool = False,
    seed: int = 0,
    tokenizer: Any = None,
    option: str = DATASET,
) -> Any:
    """Mix all parts into one data set, drawn at random by weight until each has been read through.

    Args:
        parts: parts of the mixture.
        columns: one column of text (default: "text"), or two for encoder and decoder.
        streaming: whether to fetch rows on demand.
        seed: random seed of the order.
        tokenizer: for the template of chats.
        option: name of the option, for messages.

    Raises:
        MQAError: for unreadable sources, missing columns and invalid weights.
    """
    import datasets

    if len(columns) > 2:
        raise MQAError(f"`columns` takes one column, or two of pairs; got {', '.join(columns)}")
    if not parts or not all(0 < part.weight < math.inf for part in parts):
        raise MQAError(f"{option} needs weights above 0; got {[part.weight for part in parts]}")
    found = []
    for part in parts:
        rows = choose_columns(part.source, open_dataset(part.source, streaming, option), columns, tokenizer, option)
        found.append(rows.shuffle(seed=seed, buffer_size=BUFFER) if streaming else rows.shuffle(seed=seed))
    if len(found) == 1:
        return found[0]
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    return datasets.interleave_datasets(found, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def batches(rows: Any, column: str = "text") -> Iterator[list[Any]]:
    for batch in read_batches(rows):
        yield [text for text in batch[column] if text]  # skip rows without text


def read_batches(rows: Any) -> Iterator[dict[str, list[Any]]]:
    """Yield rows in batches; raises MQAError if one cannot be read."""
    found = rows.iter(batch_size=BATCH)
    with suppress(StopIteration):
        while True:
            yield reading("the text", next, found)


def packed(texts: Iterator[list[str]], tokenizer: Any, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Pack documents, each followed by eos, into rows of `length` tokens without padding.

    Yields:
        `input_ids` [length], and `position_ids` [length], which start at 0 again with each document: transformers
        reads from them that tokens do not attend across (`find_packed_sequence_indices`).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, starts = np.empty(0, np.int32), np.empty(0, bool)
    index = np.arange(length)
    for batch in texts:
        if not batch:
            continue
        found = tokenizer(batch, verbose=False).input_ids
        pieces = [np.array(words if words[-1:] == end else words + end, np.int32) for words in found]
        first = [np.arange(len(piece)) == 0 for piece in pieces]
        ids, starts = np.concatenate([ids, *pieces]), np.concatenate([starts, *first])
        while len(ids) >= length:
            beginning = np.maximum.accumulate(np.where(starts[:length], index, 0))
            yield {"input_ids": ids[:length], "position_ids": (index - beginning).astype(np.int32)}
            ids, starts = ids[length:], starts[length:]


def paired(
    rows: Any, tokenizer: Any, length: int, seed: int, sentinels: Sequence[int] = ()
) -> Iterator[dict[str, list[int]]]:
    """Examples of an encoder-decoder model: `input_ids` and `labels` of at most `length` tokens each.

    Pairs of texts are translated. Of a single text, spans are hidden where the tokenizer has sentinels (T5, arXiv
    1910.10683, section 3.1.4).
    """
    generator = torch.Generator().manual_seed(seed)
    names = column_names(rows)
    if "target" in names:
        options = {"truncation": True, "max_length": length, "verbose": False}
        for batch in read_batches(rows):
            both = [(one, other) for one, other in zip(batch["source"], batch["target"]) if one and other]
            if not both:
                continue
            sources = tokenizer([one for one, _ in both], **options).input_ids
            targets = tokenizer(text_target=[other for _, other in both], **options).input_ids
            yield from (
                {"input_ids": one, "labels": other}
                for one, other in zip(sources, targets)
                if len(one) > 1 and len(other) > 1
            )
        return
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in packed(batches(rows), tokenizer, length - 2):
        one, other = corrupt_spans(row["input_ids"].tolist(), sentinels, generator)
        yield {"input_ids": one + end, "labels": other + end}


def training_rows(
    parts: Sequence[Part],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    columns: Sequence[str] = (),
    pairs: bool = False,
    streaming: bool = False,
    seed: int = 0,
    option: str = DATASET,
) -> Any:
    """The examples of a training run, cached on disk by `datasets` for the same text and options.

    Args:
        parts, columns, streaming, seed: see [`mixture`].
        tokenizer: of transformers.
        length: tokens of a row, or maximum number of tokens of either side of a pair.
        count: rows wanted. A text may give fewer; training then repeats them in another order.
        pairs: whether they are for an encoder-decoder model.
        option: name of the option, for messages.

    Returns:
        A `Dataset`, or an endless `IterableDataset` if streaming.
    """
    import datasets
    from datasets.fingerprint import Hasher

    if not pairs:
        one_column(columns, "`columns`")
    sentinels = sentinel_ids(tokenizer) if pairs and len(columns) != 2 else []
    if pairs and len(columns) != 2 and len(sentinels) < 2:
        raise MQAError(
            "this tokenizer has no sentinels for span corruption; name two columns, such as `columns` en,de"
        )

    # Outside of the generators, in which `datasets` would replace its errors.
    opened = mixture(parts, columns, streaming, seed, tokenizer, option)
    if pairs and len(columns) == 2 and not streaming:
        count = min(count, len(opened))  # so that the cached rows do not depend on a larger count

    nothing = f"{', '.join(part.source for part in parts)}: no row of {length} tokens in the text; add text or lower "
    nothing += "`sequence_length`"

    def once(turn: int) -> Iterator[dict[str, Any]]:
        rows = mixture(parts, columns, streaming, seed + turn, tokenizer, option) if turn else opened
        if pairs:
            yield from paired(rows, tokenizer, length, seed + turn, sentinels)
        else:
            yield from packed(batches(rows), tokenizer, length)

    def endless() -> Iterator[dict[str, Any]]:
        turn, some = 0, True
        while some:
            some = False
            for row in once(turn):
                some = True
                yield row
            turn += 1
        raise MQAError(nothing)

    def first() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(once(0)):
            if i == count:
                return
            yield row

    if streaming:
        return datasets.IterableDataset.from_generator(endless)
    known = [(os.path.abspath(part.source), part.weight, stamps(part.source)) for part in parts]
    vocabulary = Hasher.hash(sorted(tokenizer.get_vocab().items()))
    words = (vocabulary, tokenizer.eos_token_id, tokenizer.chat_template)
    made_of = (known, words, length, count, list(columns), pairs, seed, "1")
    if count < 1 or next(iter(first()), None) is None:
        raise MQAError(nothing)
    rows = kept(first, ("input_ids", "labels" if pairs else "position_ids"), -1 if pairs else length, made_of)
    return rows if pairs else rows.with_format("numpy")


def kept(rows: Callable[[], Iterator[dict[str, Any]]], names: Sequence[str], length: int, made_of: Any) -> Any:
    """Cache rows on disk: columns of lists of `length` numbers (-1: any length), keyed by `made_of`."""
    import datasets
    from datasets.fingerprint import Hasher

    features = datasets.Features(dict.fromkeys(names, datasets.Sequence(datasets.Value("int32"), length=length)))
    try:
        return datasets.Dataset.from_generator(rows, features=features, fingerprint=Hasher.hash(made_of))
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, MQAError):
            raise error.__cause__ from None
        raise


def collate_packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Batch packed rows [B, T], with the token to predict at each position; `IGNORED` at the end of a document."""
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    positions = torch.from_numpy(np.stack([row["position_ids"] for row in rows])).long()
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORED)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def starts_with_last(config: Any) -> bool:
    """Whether the decoder input begins with the last label of a row, as in mBART."""
    return getattr(config, "start_is_last_label", config.model_type in ("mbart", "plbart"))


@dataclass(frozen=True)
class CollatePairs:
    """Batch pairs [B, S] and [B, T], padded on the right to a multiple of 8, or to `length` if it is set."""

    pad: int
    start: int
    length: int | None = None
    start_is_last: bool = False  # the decoder begins with the last label of a row (mBART)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(side: list[list[int]], value: int) -> torch.Tensor:
            length = self.length or -(-max(map(len, side)) // 8) * 8
            return torch.tensor([list(row) + [value] * (length - len(row)) for row in side])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = padded([row["input_ids"] for row in rows], self.pad)
        labels = padded([row["labels"] for row in rows], IGNORED)
        written = shift_right(labels, self.start, self.pad, self.start_is_last)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "decoder_input_ids": written,
            "labels": labels,
        }


@dataclass(frozen=True)
class TrainingSet:
    """The training and validation rows of a model.

    Attributes:
        rows: from [`training_rows`].
        collate: makes a batch of rows.
        row_tokens: tokens that a row predicts; for pairs, the mean number of decoder tokens.
        validation: rows that losses are measured on.
    """

    rows: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    row_tokens: float
    validation: Any = None


def check_there(job: Training) -> None:
    """Raise MQAError if a text file of a job is missing."""
    for part in job.parts:
        check_file(part.source, DATASET)
    if job.validation is not None:
        check_file(job.validation, "`validation`")


def training_set(tokenizer: Any, config: Any, job: Training) -> TrainingSet:
    """The text of a job, prepared for a model with `config`."""
    assert job.tokens is not None, "a job is resolved first"
    pairs, length = bool(config.is_encoder_decoder), job.sequence_length
    common: dict[str, Any] = {"columns": job.columns, "pairs": pairs, "seed": job.seed}
    if not (pairs or job.streaming):  # for pairs, when their lengths are known
        check_rows(job, job.steps(length))
    with processes().main_process_first():
        validation = None
        if job.validation is not None:  # first, so that its errors show early
            part, count = (Part(job.validation),), math.ceil(job.validation_tokens / length)
            validation = training_rows(part, tokenizer, length, count, option="`validation`", **common)
        # Pairs may have one token each, so this is the most that can be used.
        wanted = job.tokens if pairs else job.steps(length) * job.rows
        rows = training_rows(job.parts, tokenizer, length, wanted, streaming=job.streaming, **common)
    if not pairs:
        return TrainingSet(rows, collate_packed, length, validation)
    fixed = length if job.streaming else None
    collate = CollatePairs(config.pad_token_id, config.decoder_start_token_id, fixed, starts_with_last(config))
    return TrainingSet(rows, collate, mean_tokens(rows), validation)


def mean_tokens(rows: Any) -> float:
    """Mean number of decoder tokens per pair, over the first 1,000 pairs."""
    lengths = [len(row["labels"]) for row in itertools.islice(iter(rows), 1000)]
    return sum(lengths) / len(lengths)
