"""Benchmark results as a table."""

from collections.abc import Sequence

from rich.table import Table

from mqa_hf.base.shapes import unique_names

from .benchmark_record import BenchmarkRecord

NOTHING = "-"


def model_names(records: Sequence[BenchmarkRecord]) -> list[str]:
    """Name each record by what differs from the others: the shape, the model, or both."""
    shapes, pairs = {r.shape for r in records}, {(r.shape, r.model) for r in records}
    if len(shapes) == 1:
        return [r.model for r in records]
    names = dict(zip(sorted(shapes), unique_names(sorted(shapes))))
    if len(pairs) == len(shapes):
        return [names[r.shape] for r in records]
    return [f"{names[r.shape]}: {r.model}" for r in records]


def shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return NOTHING if value is None else format(value / unit, form)


def row_of(record: BenchmarkRecord, name: str) -> dict[str, str]:
    """By column."""
    r = record
    identity = {
        "model": name,
        "batch": f"{r.batch}{' (largest)' if r.largest_batch else ''}",
        "context": str(r.context) if r.source is None else f"{r.source} to {r.context}",
        "beams": str(r.beams),
        "keys": r.keys or NOTHING,
    }
    if r.error is not None:
        return {**identity, "ms/token": r.error[:40]}
    return {
        **identity,
        "ms/token": shown(r.time_per_token_ms, ".2f"),
        "p10 to p90": f"{shown(r.time_per_token_p10_ms, '.2f')} to {shown(r.time_per_token_p90_ms, '.2f')}",
        "tokens/s": shown(r.tokens_per_sec, ",.0f"),
        "first token, s": shown(r.time_to_first_token_sec, ".3f"),
        "encoder, ms": shown(r.encoder_sec, ".2f", 1e-3),
        "warm-up, s": shown(r.warmup_sec, ".1f"),
        "cache, GB": shown(r.cache_bytes, ".2f", 1e9),
        "peak, GB": shown(r.peak_memory_bytes, ".2f", 1e9),
        "floor, ms": shown(r.floor_ms, ".2f"),
        "of the floor": shown(r.floor_share, ".0%"),
        "of copy": shown(r.bandwidth_share, ".0%"),
    }


def title_of(record: BenchmarkRecord, shapes: Sequence[str], window: int | None) -> str:
    """Title: what all records of a benchmark have in common."""
    limits = (
        f"copy {shown(record.copy_bandwidth, '.2f', 1e12)} TB/s, matrix product "
        f"{shown(record.matmul_rate, '.1f', 1e12)} TFLOP/s"
    )
    seen = f", window {window}" if window else ""
    seen += f", {record.ranks} processes" if record.ranks > 1 else ""
    return f"{', '.join(shapes)}, {record.dtype}, {record.device} ({limits}){seen}"


def timing_table(records: Sequence[BenchmarkRecord], window: int | None = None) -> Table:
    """Make a table with one row per record; empty columns are left out."""
    rows = [row_of(record, name) for record, name in zip(records, model_names(records))]
    shapes = list(dict.fromkeys(r.shape for r in records))
    table = Table(title=title_of(records[0], shapes, window), title_justify="left")
    empty = {name for row in rows for name in row if all(row.get(name, NOTHING) == NOTHING for row in rows)}
    if all(row["beams"] == "1" for row in rows):
        empty.add("beams")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in empty]
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table
