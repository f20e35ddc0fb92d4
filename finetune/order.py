"""The order in which rows are trained on."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from mqa_hf.base.errors import MQAError

from .options import Schedule

MOST_ROWS = 2**30  # the order takes 8 bytes per row in memory
POOL = 50  # steps whose pairs are sorted by length together, as in transformers


def in_order(rows: Any, schedule: Schedule, steps: int) -> Any:
    """The rows of `steps` steps, the same for any number of processes: repeated passes, each shuffled anew.

    The pairs of a step have similar lengths, as in arXiv 1706.03762, section 5.1, to save padding.
    """
    check_rows(schedule, steps)
    generator = np.random.default_rng(schedule.seed)
    wanted = steps * schedule.rows
    order = np.empty(wanted, np.int64)
    for start in range(0, wanted, len(rows)):
        order[start : start + len(rows)] = generator.permutation(len(rows))[: wanted - start]
    if by_like_length(rows):
        columns = rows.with_format("arrow")
        lengths = sum(pc.list_value_length(columns[name]).to_numpy() for name in ("input_ids", "labels"))
        pool = POOL * schedule.rows
        order = np.concatenate([by_length(part, lengths, schedule.rows, generator) for part in cut(order, pool)])
    return rows.select(order)


def check_rows(schedule: Schedule, steps: int) -> None:
    """Raise MQAError if a training reads more rows than can be shuffled."""
    wanted = steps * schedule.rows
    if wanted > MOST_ROWS:
        raise MQAError(
            f"`tokens` {schedule.tokens:,} are {wanted:,} rows, but at most {MOST_ROWS:,} can be shuffled; lower it, "
            "raise `sequence_length`, or use `streaming`"
        )


def by_like_length(rows: Any) -> bool:
    """Whether the rows are pairs that are not streamed."""
    return hasattr(rows, "__len__") and {"input_ids", "labels"} <= set(rows.column_names)


def cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(order, range(size, len(order), size))


def by_length(order: np.ndarray, lengths: Any, rows: int, generator: np.random.Generator) -> np.ndarray:
    """The same rows, grouped into steps of similar length, with the steps in random order."""
    steps = cut(order[np.argsort(lengths[order], kind="stable")], rows)
    return np.concatenate([steps[i] for i in generator.permutation(len(steps))])
