"""The table of a report: a row for each checkpoint, quality first, then costs, compared with the original's."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from .evaluation_record import CheckpointResult
from .report_data import Results
from .report_series import Series, series_of

DECIDING = 2  # quality columns before the cost columns; the others follow them
WIDEST = 7  # columns of a table on the page: as many as fit on paper
# Heading, part of a checkpoint's results, field in it, format
NEXT_TOKEN = (
    ("loss, nats per token", "next_token", "loss", ".3f"),
    ("loss above the original's", "next_token", "loss_above_original", "+.3f"),
    ("perplexity", "next_token", "perplexity", ".2f"),
    ("bits per byte", "next_token", "bits_per_byte", ".3f"),
    ("KL to the original, nats", "next_token", "kl", ".3f"),
    ("same first choice", "next_token", "same_first_choice", ".1%"),
)
TRANSLATED = (
    ("bleu", "BLEU", ".1f"),
    ("bleu_above_original", "BLEU above the original's", "+.1f"),
    ("chrf", "chrF", ".1f"),
)
TRANSCRIBED = (("word_error_rate", "word errors", ".1%"),)
CONTINUED = (
    ("tokens before it differs", "writing", "agreeing_tokens", ".1f"),
    ("repetition", "writing", "repetition", ".1%"),
)


@dataclass(frozen=True)
class Entry:
    """A cell of the table.

    Attributes:
        value: the number as text.
        interval: text below it: its interval, or a comparison with the original's.
        number: the value to sort by; `None` if there is none.
    """

    value: str = ""
    interval: str = ""
    number: float | None = None

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value

    @property
    def sorted_by(self) -> str:
        """The number for JavaScript; "" for none, which is sorted last."""
        if self.number is None or math.isnan(self.number):
            return ""
        return repr(self.number) if math.isfinite(self.number) else f"{'-' * (self.number < 0)}Infinity"


@dataclass(frozen=True)
class Row:
    name: str
    series: Series
    cells: list[Entry]


@dataclass(frozen=True)
class Part:
    """Columns of the table that are shown together, with a heading of their own."""

    title: str
    columns: range


@dataclass(frozen=True)
class Table:
    """The headings of all columns but that of names, the rows, and where groups of columns begin.

    Attributes:
        head: the headings.
        rows: one for each checkpoint.
        groups: headings of groups of columns, and the number of columns in each.
    """

    head: list[str]
    rows: list[Row]
    groups: list[tuple[str, int]]

    def parts(self) -> list[Part]:
        """The groups of columns; those too wide for paper are divided."""
        found, begin = [], 0
        for title, count in self.groups:
            pieces = math.ceil(count / WIDEST)
            ends = [begin + count * i // pieces for i in range(pieces + 1)] if count else []
            for piece, (first, last) in enumerate(itertools.pairwise(ends), 1):
                found.append(Part(title if pieces == 1 else f"{title}, {piece} of {pieces}", range(first, last)))
            begin += count
        return found

    def tabbed(self) -> str:
        """The table as text with tabs, to copy into a spreadsheet."""
        lines = [["", *self.head], *([row.name, *map(str, row.cells)] for row in self.rows)]
        return "\n".join(map("\t".join, lines))

    def markdown(self, name: str) -> list[str]:
        """The lines of a table in Markdown, with the row of `name` in bold."""
        lines = ["| | " + " | ".join(self.head) + " |", "|---" * (len(self.head) + 1) + "|"]
        for row in self.rows:
            title = f"**{row.name}**" if row.name == name else row.name
            lines.append(f"| {title} | " + " | ".join(map(str, row.cells)) + " |")
        return lines


def quality_columns(results: Results) -> list[tuple[str, str, str, str]]:
    """Heading, part, field and format of each quality column; the deciding ones come first."""
    first = results.checkpoints[0]
    if first.greedy is not None:
        names = TRANSCRIBED if first.greedy.word_error_rate is not None else TRANSLATED
        kinds = (("beam", f"beam {results.evaluation.settings.beams}"), ("greedy", "greedy"))
        written = [(f"{said}, {title}", kind, name, form) for kind, title in kinds for name, said, form in names]
        return [*written, *NEXT_TOKEN]
    return [*NEXT_TOKEN, *(CONTINUED if first.writing is not None else ())]


def task_columns(results: Results) -> list[tuple[str, str]]:
    """Tasks of lm-eval and their metrics."""
    tasks = results.checkpoints[0].tasks
    return [
        (task, metric)
        for task, numbers in (tasks.results if tasks else {}).items()
        for metric, value in numbers.items()
        if isinstance(value, float) and "stderr" not in metric
    ]


def table_of(results: Results) -> Table:
    first = results.checkpoints[0]
    columns, tasks, cells = quality_columns(results), task_columns(results), results.shared_cells()
    times = {cell: results.step_times(cell) for cell in dict.fromkeys(cells[:1] + cells[-1:])}
    head = [title for title, *_ in columns]
    head[DECIDING:DECIDING] = [
        "cache, bytes per token",
        *(f"ms per step, batch {batch:,}, context {context:,}" for batch, context in times),
    ]
    main = min(DECIDING, len(columns)) + 1 + len(times)
    groups = [
        ("Quality and cost", main),
        ("More measures of quality", len(head) - main),
        ("lm-eval tasks", len(tasks)),
    ]
    head += [f"{task}, {metric.removesuffix(',none')}" for task, metric in tasks]
    rows = []
    for found in results.checkpoints:
        entries = [
            # The original has no difference from itself.
            Entry() if found is first and name.endswith("above_original") else measured(found, part, name, form)
            for _, part, name, form in columns
        ]
        entries[DECIDING:DECIDING] = [
            cache_entry(found, first),
            *(
                beside_original(ms.get(found.name), ms.get(first.name), ".2f", "faster", "slower")
                for ms in times.values()
            ),
        ]
        scores = found.tasks.results if found.tasks else {}
        entries += [entry(scores.get(task, {}).get(metric), None, ".3f") for task, metric in tasks]
        rows.append(Row(found.name, series_of(results, found.name), entries))
    return Table(head, rows, groups)


def cache_entry(found: CheckpointResult, first: CheckpointResult) -> Entry:
    """Cache bytes per token, compared with the original's, and the latent, if any."""
    size = beside_original(found.kv_bytes_per_token, first.kv_bytes_per_token, ",", "smaller", "larger")
    said = [*filter(None, (size.interval, found.latent.name if found.latent else ""))]
    return Entry(size.value, "; ".join(said), size.number)


def measured(found: CheckpointResult, part: str, name: str, form: str) -> Entry:
    """A number of a checkpoint and its interval."""
    numbers = getattr(found, part)
    return entry(getattr(numbers, name, None), getattr(numbers, f"{name}_interval", None), form)


def entry(value: float | None, interval: Any, form: str) -> Entry:
    """A number and its interval in the format `form`."""
    if value is None or not isinstance(value, int | float):
        return Entry()
    ends = [format(x, form) for x in interval or () if math.isfinite(x)]
    return Entry(format(value, form), " to ".join(ends) if len(ends) == 2 else "", float(value))


def beside_original(value: float | None, original: float | None, form: str, less: str, more: str) -> Entry:
    """A cost, and how many times `less` or `more` it is than the original's: "2.7× faster"."""
    if value is None:
        return Entry()
    share = 1.0 if original is None or not value else original / value
    times, said = (share, less) if share >= 1 else (1 / share, more)
    small = f"{times:.0f}× {said}" if times >= 10 else f"{times:.2g}× {said}"
    return Entry(format(value, form), small if times > 1.05 else "", float(value))
