"""Benchmark results as plots."""

from collections.abc import Sequence
from pathlib import Path

from mqa_hf.base.figures import describe, panels, save

from .benchmark_record import BenchmarkRecord
from .timing_table import model_names

QUANTITIES = (  # x axis, one plot for each, y axis, its label
    ("context", "batch", "time_per_token_ms", "ms per token"),
    ("batch", "context", "tokens_per_sec", "tokens per second"),
)


def draw_times(records: Sequence[BenchmarkRecord], directory: Path) -> list[Path]:
    """Plot time per token over the context for each batch, and tokens per second over the batch for each context."""
    names = zip(records, model_names(records))
    timed = [(r, name) for r, name in names if r.error is None and not r.largest_batch]
    shapes = ", ".join(dict.fromkeys(Path(r.shape).name for r, _ in timed))
    written = []
    for over, per, quantity, what in QUANTITIES:
        for fixed in sorted({getattr(r, per) for r, _ in timed}):
            figure, (axes,) = panels(1, 6, 4)
            some = [(r, name) for r, name in timed if getattr(r, per) == fixed]
            for model in dict.fromkeys(name for _, name in some):
                points = sorted((getattr(r, over), getattr(r, quantity)) for r, name in some if name == model)
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=model)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            describe(axes, over, what, f"{shapes}, {timed[0][0].device}, {per} {fixed}")
            path = directory / f"{quantity}_{per}_{fixed}.png"
            save(figure, path)
            written.append(path)
    return written
