"""Token ids of calibration texts: of one text or of a mixture, for a decoder or for an encoder and a decoder."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .errors import MQAError
from .mixture import Part, shares
from .text import documents, has_columns, is_built_in, pairs

CHUNK = 32  # documents that are tokenised at once


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
    divided by weight; what a short part lacks is divided among the others. Parts of a tiny weight may get none.

    Raises:
        MQAError: if a part has not two sequences, or an id is outside the model's vocabulary.
    """
    mixed = [part for part in parts if isinstance(part, Part)]
    if len(mixed) < 2:
        source: Any = mixed[0].source if mixed else parts
        return [calibration_tokens(tokenizer, source, count, length, vocab_size, seed, columns)]
    wanted = shares(mixed, count // length)
    texts = {}
    for i, part in enumerate(mixed):
        if wanted[i]:
            own = columns if has_columns(part.source) else ()
            texts[i] = documents(part.source, own, tokenizer=tokenizer)
    found = [torch.empty(0, length, dtype=torch.long)] * len(mixed)
    left, filling = count // length, list(texts)
    while filling:
        for i in filling:
            found[i] = token_rows(texts[i], tokenizer, length, wanted[i] * length, seed).long()
        short = [i for i in filling if len(found[i]) < wanted[i]]
        left -= sum(len(found[i]) for i in short)
        filling = [i for i in filling if i not in short] if short else []
        for i, rows in zip(filling, shares([mixed[i] for i in filling], left) if filling else ()):
            wanted[i] = rows
    for i in texts:
        if not len(found[i]):
            raise MQAError(f"`calibration` {mixed[i].source} has fewer than {length} tokens, one sequence")
        check_ids(found[i], vocab_size)
    return found


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
        one, other = examples_of(tokenizer, source, columns, share, length, generator, seed) if share else ([], [])
        sources, targets, counts = sources + one, targets + other, [*counts, len(one)]
    if len(sources) < 2:
        raise MQAError(
            f"`calibration_tokens` {count:,} of the calibration text give {len(sources)} examples; give at least two, "
            f"of {length} tokens if they are not pairs"
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
    shipped = isinstance(source, str) and is_built_in(source)
    own = columns if isinstance(source, str) and not shipped else ()
    two = None if shipped else pairs(source, columns)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    total = 0
    if two is None:
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
