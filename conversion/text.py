"""Calibration text and its tokens."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .errors import ConversionError

PLAIN = (".txt", ".md", ".rst")
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def documents(source: str | os.PathLike | None) -> Sequence[str]:
    """The documents of a calibration text.

    Args:
        source: a text file, JSON lines, parquet or CSV (also compressed), or an id of the Hub's datasets; the column
            "text", else the first that holds text. `None` is Python's own reference manual, which every installation
            carries: English technical prose, enough to try things out; text like the model's own is better.

    Raises:
        ConversionError: where there is no such text.
    """
    if source is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(source)
    if path.suffix in PLAIN and path.is_file():
        return [path.read_text(encoding="utf-8", errors="replace")]
    try:
        import datasets
    except ImportError as error:
        raise ConversionError(f"--calibration {source} needs the datasets library: pip install datasets") from error
    kind = next((FORMATS[suffix] for suffix in reversed(path.suffixes) if suffix in FORMATS), None)
    try:
        if path.is_file() and kind:
            rows: Any = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.exists():
            raise ConversionError(f"--calibration {source} is none of {', '.join((*PLAIN, *FORMATS))}")
        else:
            rows = datasets.load_dataset(str(source), split="train")
    except ConversionError:
        raise
    except Exception as error:  # whatever a loader raises for what it cannot read or fetch
        raise ConversionError(f"--calibration {source} cannot be read: {error}") from error
    columns = [name for name in ("text", *rows.column_names) if name in rows.column_names]
    column = next((name for name in columns if isinstance(rows[0][name], str)), None)
    if column is None:
        raise ConversionError(f"--calibration {source} has no column of text; its columns: {', '.join(columns)}")
    return rows[column]  # read from disk row by row


def calibration_tokens(
    directory: Path, source: str | os.PathLike | None, count: int, length: int, vocab_size: int, seed: int
) -> torch.Tensor:
    """Token ids [N, length] of a calibration text, its documents in an order drawn by `seed`, each ended by eos.

    Args:
        directory: of the checkpoint whose tokenizer is used.
        source: see [`documents`].
        count: tokens wanted; a shorter text gives fewer.
        length: of a sequence.
        vocab_size: of the model, which every id must be below.
        seed: of the order.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever tokenizers raise for files that are none
        raise ConversionError(
            f"--method shared needs the source's tokenizer, which cannot be loaded: {error}"
        ) from error
    texts = documents(source)
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist():
        ids += tokenizer(texts[i], verbose=False).input_ids + end
        if len(ids) >= count:
            break
    rows = min(len(ids), count) // length
    if rows < 2:
        raise ConversionError(
            f"the calibration text gives {len(ids)} tokens; at least two sequences of {length} are needed"
        )
    tokens = torch.tensor(ids[: rows * length]).view(rows, length)
    if int(tokens.max()) >= vocab_size:
        raise ConversionError(f"the tokenizer gives ids up to {int(tokens.max())}; the model has {vocab_size}")
    return tokens
