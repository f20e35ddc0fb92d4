"""Training text: mixtures of data sets, packed into rows for a decoder or paired for an encoder-decoder model.

Everything is read through `datasets`: local text, JSON lines, parquet or CSV, or an id of the Hub, whole or streamed.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from mqa_hf.base.chats import Document, encoded, form_of, holds_text, in_pieces
from mqa_hf.base.console import NORMAL, verbosity
from mqa_hf.base.devices import processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import stamps
from mqa_hf.base.mixture import Part
from mqa_hf.base.text import (
    check_source,
    check_template,
    documents,
    features_of,
    has_columns,
    load,
    load_processor,
    no_text,
)
from mqa_hf.base.tokens import corrupt_spans, sentinel_ids
from mqa_hf.modeling_mqa_seq2seq import shift_right

from .options import Training
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
    if has_columns(source, option):
        return load(source, option, streaming)
    import datasets

    whole = datasets.Dataset.from_list([{"text": text} for text in documents(source, option=option)])
    return whole.to_iterable_dataset() if streaming else whole


def column_names(rows: Any) -> list[str]:
    return list(rows.column_names or next(iter(rows), {}))


def choose_columns(
    source: str,
    rows: Any,
    columns: Sequence[str],
    tokenizer: Any = None,
    option: str = DATASET,
    pairs: bool = False,
    answers: bool = False,
) -> Any:
    """The same rows with one column "text" (see [`form_of`]), or with "source" and "target" for pairs.

    Args:
        columns: also two languages of "translation", as the Hub's data sets of translations have them.
        tokenizer: for the template of chats.
        pairs: whether two columns are for encoder and decoder.
        answers: whether to add a column "answers", the beginning and end of each answer in the text.
    """
    import datasets

    features = reading(f"{option} {source}", features_of, rows)
    known = list(features)
    if pairs and "translation" in known and len(columns) == 2:
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
    if pairs and len(columns) == 2:
        return renamed(source, rows, features, columns, ("source", "target"), option)
    form = form_of(features, columns)
    if form is None or form.kind == "text":
        if answers and form is not None:
            said = f"{option} {source}: {form.columns[0]} holds texts, which have no answers"
            raise MQAError(f"{said}; use `loss_on` all")
        if len(columns) > 1:
            raise no_text(source, option, columns, features)
        return renamed(source, rows, features, columns or ("text",), ("text",), option)
    check_template(form, tokenizer, f"{option} {source}")

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text, places, *_ = form.read(row, tokenizer, answers)
        return {"text": text, **({"answers": [list(place) for place in places or []]} if answers else {})}

    kinds: dict[str, Any] = {"text": datasets.Value("string")}
    if answers:
        kinds["answers"] = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
    return reading(f"{option} {source}", rows.map, read, remove_columns=known, features=datasets.Features(kinds))


def renamed(source: str, rows: Any, features: Any, columns: Sequence[str], names: Sequence[str], option: str) -> Any:
    """The same rows with only these columns of text, under other names."""
    import datasets

    # A part of a mixture or the beginning of a stream may have no rows.
    wrong = [n for n in columns if not holds_text(features.get(n)) and getattr(features.get(n), "dtype", "") != "null"]
    if wrong:
        raise no_text(source, option, wrong, features)
    rows = rows.select_columns(list(columns))
    for old, new in zip(columns, names):
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
    pairs: bool = False,
    answers: bool = False,
) -> Any:
    """Mix all parts into one data set, drawn at random by weight until each has been read through.

    Args:
        parts: parts of the mixture.
        columns, pairs, answers: see [`choose_columns`].
        streaming: whether to fetch rows on demand.
        seed: random seed of the order.
        tokenizer: for the template of chats.
        option: name of the option, for messages.

    Raises:
        MQAError: for unreadable sources, missing columns and invalid weights.
    """
    if pairs and len(columns) > 2:
        raise MQAError(f"`columns` takes one column, or two of pairs; got {', '.join(columns)}")
    check_weights(parts, option)
    found = []
    for part in parts:
        opened = open_dataset(part.source, streaming, option)
        own = columns if pairs or has_columns(part.source, option) else ()
        rows = choose_columns(part.source, opened, own, tokenizer, option, pairs, answers)
        found.append(rows.shuffle(seed=seed, buffer_size=BUFFER) if streaming else rows.shuffle(seed=seed))
    return interleaved(found, parts, seed, option)


def check_weights(parts: Sequence[Part], option: str) -> None:
    if not parts or not all(0 < part.weight < math.inf for part in parts):
        raise MQAError(f"{option} needs weights above 0; got {[part.weight for part in parts]}")


def interleaved(found: Sequence[Any], parts: Sequence[Part], seed: int, option: str) -> Any:
    """The rows of all parts, drawn at random by weight until each has been read through."""
    import datasets

    if len(found) == 1:
        return found[0]
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    mix = datasets.interleave_datasets
    return reading(option, mix, found, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def batches(rows: Any) -> Iterator[list[Document]]:
    for batch in read_batches(rows):
        answers = batch.get("answers") or [None] * len(batch["text"])
        found = (Document(text, places) for text, places in zip(batch["text"], answers))
        yield [document for document in found if document.text]  # skip rows without text


def read_batches(rows: Any) -> Iterator[dict[str, list[Any]]]:
    """Yield rows in batches; raises MQAError if one cannot be read."""
    found = rows.iter(batch_size=BATCH)
    with suppress(StopIteration):
        while True:
            yield reading("the text", next, found)


def packed(
    texts: Iterator[list[Document]], tokenizer: Any, length: int, answers: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Pack documents, each followed by eos, into rows of `length` tokens without padding.

    Yields:
        `input_ids` [length], and `position_ids` [length], which start at 0 again with each document: transformers
        reads from them that tokens do not attend across (`find_packed_sequence_indices`). With `answers`, also
        `answered` [length], 1 for tokens of answers and an eos that follows them; rows without any are left out.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, starts, answered = np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int32)
    index = np.arange(length)
    for batch in itertools.chain.from_iterable(in_pieces(some, tokenizer) for some in texts):
        pieces = []
        for document, (words, own) in zip(batch, encoded(batch, tokenizer, answers)):
            more = end if document.ends and words[-1:] != end else []
            pieces.append((np.array(words + more, np.int32), own + own[-1:] * len(more), document.begins))
        ids = np.concatenate([ids, *(words for words, _, _ in pieces)])
        starts = np.concatenate([starts, *((np.arange(len(words)) == 0) & begins for words, _, begins in pieces)])
        if answers:  # an eos belongs to the answer before it
            answered = np.concatenate([answered, *(np.array(own, np.int32) for _, own, _ in pieces)])
        while len(ids) >= length:
            beginning = np.maximum.accumulate(np.where(starts[:length], index, 0))
            row = {"input_ids": ids[:length], "position_ids": (index - beginning).astype(np.int32)}
            if answers:
                row["answered"] = answered[:length]
            if not answers or answered[1:length].any():
                yield row
            ids, starts, answered = ids[length:], starts[length:], answered[length:]


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
    answers: bool = False,
) -> Any:
    """The examples of a training run, cached on disk by `datasets` for the same text and options.

    Args:
        parts, columns, streaming, seed: see [`mixture`].
        tokenizer: of transformers.
        length: tokens of a row, or maximum number of tokens of either side of a pair.
        count: rows wanted. A text may give fewer; training then repeats them in another order.
        pairs: whether they are for an encoder-decoder model.
        option: name of the option, for messages.
        answers: whether only the tokens of answers are to be predicted.

    Returns:
        A `Dataset`, or an endless `IterableDataset` if streaming.
    """
    import datasets
    from datasets.fingerprint import Hasher

    sentinels = sentinel_ids(tokenizer) if pairs and len(columns) != 2 else []
    if pairs and len(columns) != 2 and len(sentinels) < 2:
        raise MQAError(
            "this tokenizer has no sentinels for span corruption; name two columns, such as `columns` en,de"
        )

    # Outside of the generators, in which `datasets` would replace its errors.
    opened = mixture(parts, columns, streaming, seed, tokenizer, option, pairs, answers)
    if pairs and len(columns) == 2 and not streaming:
        count = min(count, len(opened))  # so that the cached rows do not depend on a larger count

    nothing = f"{', '.join(part.source for part in parts)}: no row of {length} tokens in the text; add text or lower "
    nothing += "`sequence_length`"

    def once(turn: int) -> Iterator[dict[str, Any]]:
        rows = mixture(parts, columns, streaming, seed + turn, tokenizer, option, pairs, answers) if turn else opened
        if pairs:
            yield from paired(rows, tokenizer, length, seed + turn, sentinels)
        else:
            yield from packed(batches(rows), tokenizer, length, answers)

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
        found = False
        for row in itertools.islice(once(0), count):
            found = True
            yield row
        if not found:
            raise MQAError(nothing)

    if streaming:
        return datasets.IterableDataset.from_generator(endless)
    known = [(os.path.abspath(part.source), part.weight, stamps(part.source)) for part in parts]
    vocabulary = Hasher.hash(sorted(tokenizer.get_vocab().items()))
    words = (vocabulary, tokenizer.eos_token_id, tokenizer.chat_template)
    made_of = (known, words, length, count, list(columns), pairs, seed, answers, "2")
    names = ("input_ids", "labels" if pairs else "position_ids", *(("answered",) if answers else ()))
    rows = kept(first, names, -1 if pairs else length, made_of)
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
    """Batch packed rows [B, T], with the token to predict at each position; `IGNORED` at the end of a document, and
    where only answers are predicted before other tokens."""
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    positions = torch.from_numpy(np.stack([row["position_ids"] for row in rows])).long()
    labels = torch.full_like(ids, IGNORED)
    left_out = positions[:, 1:] == 0
    if "answered" in rows[0]:
        left_out |= torch.from_numpy(np.stack([row["answered"] for row in rows]))[:, 1:] == 0
    labels[:, :-1] = ids[:, 1:].masked_fill(left_out, IGNORED)
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
        check_source(part.source, DATASET)
    if job.validation is not None:
        check_source(job.validation, "`validation`")


def training_set(tokenizer: Any, config: Any, job: Training, checkpoint: Path | None = None) -> TrainingSet:
    """The text of a job, prepared for a model with `config`; recordings for a speech model, with the processor of its
    `checkpoint`."""
    assert job.tokens is not None, "a job is resolved first"
    if getattr(config, "num_mel_bins", None) and checkpoint is not None:
        from .speech import speech_set

        with processes().main_process_first():
            rows, validation, heard = speech_set(load_processor(checkpoint), config, job)
        return TrainingSet(rows, heard, mean_tokens(rows.select_columns(["labels"])), validation)
    pairs, length, answers = bool(config.is_encoder_decoder), job.sequence_length, job.loss_on == "answers"
    if pairs and answers:
        raise MQAError("`loss_on` answers is for decoder-only models; an encoder-decoder model writes only the target")
    common: dict[str, Any] = {"columns": job.columns, "pairs": pairs, "seed": job.seed, "answers": answers}
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
