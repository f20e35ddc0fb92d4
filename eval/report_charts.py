"""The pictures of a report: as SVG for its page, in the colour of the page's text, and as PNG."""

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError

from .report_data import Results, Timing

INK = "#123456"  # stands for the colour of the page's text in pictures, light or dark
COLOURS = ("#8a8f98", "#d1495b", "#2a9d8f", "#e09f3e", "#5b7db1", "#9b5de5", "#6a994e", "#c77dff")
STYLES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)))
LAYER_ERRORS = {
    "attention_error": "attention output",
    "key_error": "keys",
    "value_error": "values",
    "cross_attention_error": "cross-attention output",
    "cross_key_error": "keys, cross-attention",
    "cross_value_error": "values, cross-attention",
}


def colour_of(results: Results, name: str) -> str:
    """Of a checkpoint, or of what else was timed."""
    names = results.names
    names += sorted({timing.label for timing in results.timings} - set(names))
    return COLOURS[names.index(name) % len(COLOURS)]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as low as in both numbers: the Pareto front, from left to right."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def axes_of(width: float = 5.6, height: float = 3.7) -> tuple[Any, Any]:
    figure, (axes,) = rows_of_axes(1, width, height)
    return figure, axes


def rows_of_axes(rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure, and as many axes under each other."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MQAError("mqa-hf report needs matplotlib: pip install 'mqa-hf[benchmark]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
    for axes in found:
        axes.grid(alpha=0.25, which="both", color=INK, lw=0.5)
        for side in axes.spines.values():
            side.set_color(INK)
            side.set_linewidth(0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=INK, labelsize=10)
    return figure, found


def label_axes(axes: Any, x: str, y: str, legend: bool = False) -> None:
    axes.set_xlabel(x, color=INK, fontsize=10.5)
    axes.set_ylabel(y, color=INK, fontsize=10.5)
    if legend:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)


def plain_ticks(axis: Any) -> None:
    """Numbers on a logarithmic axis as they are; those between powers too where there are few powers."""
    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high < 12 * low else "")
    axis.axes.tick_params(which="minor", labelsize=7)


def trade(results: Results, points: dict[str, float], what: str) -> Any:
    """Quality over a cost, one point a checkpoint, the Pareto front as a line."""
    if len(points) < 2:
        return None
    figure, axes = axes_of()
    found, title, sign = results.quality()
    line = front([(x, sign * found[name][0]) for name, x in points.items()])
    axes.plot([x for x, _ in line], [sign * y for _, y in line], color=INK, lw=1, ls=":", zorder=1)
    below: list[tuple[float, float]] = []  # points that another one's name would lie over
    for name, x in points.items():
        y, low, high = found[name]
        near = any(math.isclose(x, a, rel_tol=0.05) and math.isclose(y, b, rel_tol=0.05) for a, b in below)
        below.append((x, y))
        error = [[y - low], [high - y]]
        axes.errorbar([x], [y], yerr=error, marker="o", ms=7, color=colour_of(results, name), capsize=3)
        place = (7, -13 if near else 5)
        axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=10, color=INK)
    axes.margins(0.18)
    if title.startswith("held-out"):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    label_axes(axes, what, title)
    return figure


def cache_trade(results: Results) -> Any:
    sizes: dict[str, float] = {c.name: c.kv_bytes_per_token for c in results.checkpoints if c.kv_bytes_per_token}
    return trade(results, sizes, "cache, bytes a token")


def time_trade(results: Results) -> Any:
    if not results.shared_cells():
        return None
    batch, context = results.shared_cells()[-1]
    where = measured(results)[0].record.device
    times = results.step_times((batch, context))
    return trade(results, times, f"ms a step of {batch} rows at context {context:,} ({where})")


def measured(results: Results) -> list[Timing]:
    """Those without an error."""
    return [timing for timing in results.timings if timing.record.error is None]


def over(results: Results, x: str, fixed: str, quantity: str, what: str) -> Any:
    """A time over the batch or the context, with the other at its most frequent value."""
    some = [t for t in measured(results) if not t.record.largest_batch and t.record.beams == 1]
    values = [getattr(t.record, fixed) for t in some]
    if not some:
        return None
    most = max(sorted(set(values)), key=values.count)
    some = [t for t in some if getattr(t.record, fixed) == most]
    if len({getattr(t.record, x) for t in some}) < 2:
        return None
    figure, axes = axes_of()
    for name in dict.fromkeys(t.label for t in some):
        points = sorted((getattr(t.record, x), getattr(t.record, quantity)) for t in some if t.label == name)
        axes.plot(
            [a for a, _ in points],
            [b for _, b in points],
            marker="o",
            ms=4,
            label=name,
            color=colour_of(results, name),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    plain_ticks(axes.yaxis)
    label_axes(axes, f"{x} ({fixed} {most:,})", what, legend=True)
    return figure


def over_context(results: Results) -> Any:
    return over(results, "context", "batch", "time_per_token_ms", "ms a step")


def over_batch(results: Results) -> Any:
    return over(results, "batch", "context", "tokens_per_sec", "tokens a second")


def at_the_limit(results: Results) -> Any:
    """Tokens a second with as many rows as fit into the device's memory."""
    some = [t for t in measured(results) if t.record.largest_batch]
    if not some:
        return None
    figure, axes = axes_of(5.6, 1 + 0.5 * len(some))
    names = [f"{t.label}\n{t.record.batch:,} rows of {t.record.context:,}" for t in some]
    rates = [t.record.tokens_per_sec for t in some]
    bars = axes.barh(names, rates, color=[colour_of(results, t.label) for t in some], height=0.6)
    axes.bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates], padding=4, color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    label_axes(axes, "tokens a second", "")
    return figure


def layer_errors(results: Results) -> Any:
    """The error of each layer's attention output after the conversion, or of its keys and values."""
    lines: list[tuple[str, str, list[float]]] = []
    for name, conversion in results.conversions.items():
        if name in results.trainings:  # its conversion is that of the student
            continue
        found = conversion.layers
        fitted = any(layer.attention_error is not None for layer in found)
        for stack in dict.fromkeys(layer.stack for layer in found):
            for key, title in LAYER_ERRORS.items():
                errors = (getattr(layer, key) for layer in found if layer.stack == stack)
                values = [error for error in errors if error is not None]
                shown = key.endswith("attention_error") if fitted else True
                if shown and len(values) > 1 and any(values):
                    lines.append((name, f"{title}, encoder" if stack == "encoder" else title, values))
    if not lines:
        return None
    figure, axes = axes_of()
    styles: dict[str, Any] = dict(zip(sorted({title for _, title, _ in lines}), itertools.cycle(STYLES)))
    for name, title, values in lines:
        drawn = {"ls": styles[title], "color": colour_of(results, name), "label": f"{name}: {title}"}
        axes.plot(range(1, len(values) + 1), values, **drawn)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_axes(axes, "layer", "relative error", legend=True)
    return figure


def context_loss(results: Results) -> Any:
    """Loss over how many tokens stand before the predicted one."""
    if not any(len(c.loss_by_context) > 1 for c in results.checkpoints):
        return None
    figure, axes = axes_of()
    for c in results.checkpoints:
        rows = c.loss_by_context
        x = [math.sqrt(row.first * row.last) for row in rows]
        axes.plot(x, [row.loss for row in rows], marker="o", ms=4, label=c.name, color=colour_of(results, c.name))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    label_axes(axes, "tokens before the predicted one", "loss, nats a token", legend=True)
    return figure


def training_curves(results: Results) -> Any:
    """Losses over the tokens of uptraining: of training as lines, of validation as points."""
    from matplotlib.ticker import EngFormatter

    lines: list[tuple[str, str, bool, list[tuple[float, float]]]] = []
    for name, found in results.trainings.items():
        if set(found.log) != {"main"}:  # stages have losses of their own
            continue
        steps = found.log["main"]
        last = max((line["step"] or 0 for line in steps), default=0) or 1
        for loss in ("lm", "kl"):
            for key, held_out in ((loss, False), (f"eval_{loss}", True)):
                points = [
                    ((line["step"] or 0) / last * found.tokens, value)
                    for line in steps
                    if (value := line.get(key)) is not None
                ]
                if points:
                    lines.append((name, loss, held_out, points))
    kinds = [loss for loss in ("lm", "kl") if any(found[1] == loss for found in lines)]
    if not any(len(points) > 1 for *_, points in lines):
        return None
    figure, below_each_other = rows_of_axes(len(kinds), 5.6, 2.4 * len(kinds) + 0.4)
    for axes, kind in zip(below_each_other, kinds):
        for name, loss, held_out, points in lines:
            if loss == kind:
                style = {"marker": "o", "ls": ":"} if held_out else {"lw": 1}
                said = f"{name}, {'validation' if held_out else 'training'}"
                axes.plot(*zip(*points), label=said, color=colour_of(results, name), **style)
        what = {"lm": "loss", "kl": "KL to the original"}[kind]
        label_axes(
            axes, "tokens" if axes is below_each_other[-1] else "", f"{what}, nats", legend=axes is below_each_other[0]
        )
    below_each_other[-1].xaxis.set_major_formatter(EngFormatter())
    return figure


TRADE = "Further left is cheaper; no checkpoint is better and cheaper than one on the dotted line, the Pareto front."
# File name, heading, what it says, how it is drawn.
PICTURES: tuple[tuple[str, str, str, Callable[[Results], Any]], ...] = (
    ("quality-time", "Quality against time", TRADE, time_trade),
    ("quality-cache", "Quality against cache", TRADE, cache_trade),
    ("time-context", "Time over context", "A step reads the cache of all earlier tokens.", over_context),
    ("tokens-batch", "Tokens over batch", "Rows share reading the weights, not the cache.", over_batch),
    ("largest-batch", "At the memory limit", "With as many rows as fit.", at_the_limit),
    ("context-loss", "Loss by context", "What longer context brings each model.", context_loss),
    ("layers", "Error by layer", "Of the conversion, before any training.", layer_errors),
    ("training", "Uptraining", "Losses over tokens.", training_curves),
)


def svg(figure: Any) -> str:
    """The picture as part of a page, in the colours of its text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Its size is the page's to choose.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def draw_pictures(results: Results, directory: Path) -> list[dict[str, str]]:
    """All pictures that the results allow: as PNGs in `directory`, and as SVG for the page."""
    found = []
    for name, title, says, draw in PICTURES:
        figure = draw(results)
        if figure is None:
            continue
        drawn = svg(figure)
        # Identifiers of two pictures on one page must differ.
        drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
        found.append({"name": name, "title": title, "says": says, "svg": drawn})
        figure.savefig(directory / f"{name}.png", dpi=150, facecolor="white")
    return found
