"""The charts of a report: as SVG for its page, in the page's colours, and as PNG. Each comes with its main finding."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError

from .report_data import Results, Timing
from .report_labels import label_points
from .report_series import INK, in_page_colours, series_of

WIDTH, HEIGHT = 4.8, 3.4  # inches; at this width text is legible on a phone, too
TEXT = 9.5  # points
LONGEST = 40  # characters of a name
LAYER_ERRORS = {
    "attention_error": "attention output",
    "key_error": "keys",
    "value_error": "values",
    "cross_attention_error": "cross-attention output",
    "cross_key_error": "keys, cross-attention",
    "cross_value_error": "values, cross-attention",
}


@dataclass(frozen=True)
class Chart:
    """A figure, and what it shows in a sentence or two with numbers."""

    figure: Any
    finding: str


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front, from left to right: points that no other point undercuts or equals in both numbers."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def axes_of(width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, Any]:
    figure, (axes,) = rows_of_axes(1, width, height)
    return figure, axes


def rows_of_axes(rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with `rows` axes below each other."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MQAError("mqa-hf report needs matplotlib: pip install 'mqa-hf[benchmark]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(rows, sharex=True, squeeze=False)[:, 0])
    for axes in found:
        axes.grid(alpha=0.25, which="major", color=INK, lw=0.5)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_color(INK)
            side.set_linewidth(0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=INK, labelsize=9)
    return figure, found


def label_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel("\n".join(textwrap.fill(line, 52) for line in x.split("\n")), color=INK, fontsize=TEXT)
    axes.set_ylabel(y, color=INK, fontsize=TEXT)


def short(name: str) -> str:
    """A name for charts; the middle of a long one is left out."""
    half = (LONGEST - 1) // 2
    name = name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves such names out of legends


def legend_above(figure: Any) -> None:
    """Put the legend above all axes, where it covers nothing."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        for label, handle in zip(labels, found):
            handles.setdefault(label, handle)
    widest = 0.5 + 0.085 * max(map(len, handles))  # inches
    columns = max(1, int(figure.get_figwidth() / widest))
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(handles) / columns))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.6,
        columnspacing=1.2,
    )


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with a few plain numbers, also if it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if high > 2.5 * low else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,g}")


def number(value: float) -> str:
    """Format with three digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    return f"{value:.0f} times" if value >= 10 else f"{value:.1f} times"


def trade(results: Results, costs: dict[str, float], what: str, said: Callable[[float], str]) -> Chart | None:
    """Plot quality over a cost, with one point per checkpoint and the Pareto front as a line.

    Args:
        results: contain the quality.
        costs: cost by checkpoint name.
        what: label of the cost axis.
        said: words a cost for a sentence.
    """
    if len(costs) < 2:
        return None
    figure, axes = axes_of()
    quality = results.quality()
    best = front([(x, quality.sign * quality.values[name][0]) for name, x in costs.items()])
    axes.plot([x for x, _ in best], [quality.sign * y for _, y in best], color=INK, lw=1, ls=":", zorder=1)
    points = {name: (x, *quality.values[name]) for name, x in costs.items()}
    for name, (x, y, low, high) in points.items():
        look = series_of(results, name)
        drawn = {"marker": look.marker, "ms": 7, "color": look.colour, "capsize": 3, "ls": "", "label": short(name)}
        axes.errorbar([x], [y], yerr=[[y - low], [high - y]], **drawn)
    axes.margins(0.18)
    if quality.logarithmic:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    axes.xaxis.set_major_formatter("{x:,g}")
    label_axes(axes, what, quality.title)
    line = [(x, quality.sign * y) for x, y in best]
    if not label_points(axes, [(short(name), point) for name, point in points.items()], line, TEXT):
        legend_above(figure)
    on_front = [name for name, x in costs.items() if (x, quality.sign * quality.values[name][0]) in best]
    return Chart(figure, trade_finding(results, costs, said) + f" On the Pareto front: {', '.join(on_front)}.")


def trade_finding(results: Results, costs: dict[str, float], said: Callable[[float], str]) -> str:
    """The best of the checkpoints that cost less than the original."""
    quality, original = results.quality(), results.names[0]

    def better(name: str) -> float:
        return quality.sign * quality.values[name][0]

    if original not in costs:
        best = min(costs, key=better)
        return f"The best of {len(costs)} checkpoints is {best}: {quality.said(best)} at {said(costs[best])}."
    first = f"{original}: {quality.said(original)} at {said(costs[original])}."
    cheaper = [name for name in costs if costs[name] < costs[original]]
    if not cheaper:
        return f"{first} No checkpoint costs less."
    best = min(cheaper, key=better)
    which = "The only one" if len(cheaper) == 1 else f"The best of the {len(cheaper)} checkpoints"
    share = times(costs[original] / costs[best])
    that = f"that cost{'s' * (len(cheaper) == 1)} less is {best}"
    return f"{first} {which} {that}: {quality.said(best)} at {said(costs[best])}, {share} less."


def cache_trade(results: Results) -> Chart | None:
    sizes: dict[str, float] = {c.name: c.kv_bytes_per_token for c in results.checkpoints if c.kv_bytes_per_token}
    return trade(results, sizes, "cache, bytes per token", lambda size: f"{size:,.0f} bytes per token")


def time_trade(results: Results) -> Chart | None:
    if not results.shared_cells():
        return None
    batch, context = results.shared_cells()[-1]
    where = measured(results)[0].record.device
    what = f"time per step, ms\n(batch {batch:,}, context {context:,}; {where})"
    return trade(results, results.step_times((batch, context)), what, lambda time: f"{time:.2f} ms per step")


def measured(results: Results) -> list[Timing]:
    """The timings without an error."""
    return [timing for timing in results.timings if timing.record.error is None]


Lines = dict[str, list[tuple[float, float]]]


def draw_lines(axes: Any, results: Results, lines: Lines) -> None:
    """Plot lines by name, with the markers and dashes of their checkpoints."""
    for name, points in lines.items():
        look = series_of(results, name)
        drawn = {"marker": look.marker, "ls": look.dashes, "color": look.colour}
        axes.plot(*zip(*points), ms=4.5, lw=1.3, label=short(name), **drawn)


def ends_finding(lines: Lines, x: str, unit: str, best: Callable[..., Any]) -> str:
    """Say where the first line and the one that is best at the end begin and end."""
    first, *others = lines
    shown = [first] + [best(others, key=lambda name: lines[name][-1][1])] * bool(others)
    (low, _), (high, _) = lines[first][0], lines[first][-1]
    said = [f"{name} {number(lines[name][0][1])} to {number(lines[name][-1][1])}" for name in shown]
    said[0] += f" {unit}"
    return f"From {x} {number(low)} to {number(high)}: {', '.join(said)}."


def over(results: Results, x: str, fixed: str, quantity: str, unit: str, best: Callable[..., Any]) -> Chart | None:
    """Plot a time over the batch or the context, with the other at its most frequent value."""
    some = [t for t in measured(results) if not t.record.largest_batch and t.record.beams == 1]
    values = [getattr(t.record, fixed) for t in some]
    if not some:
        return None
    most = max(sorted(set(values)), key=values.count)
    some = [t for t in some if getattr(t.record, fixed) == most]
    if len({getattr(t.record, x) for t in some}) < 2:
        return None
    figure, axes = axes_of()
    lines = {
        name: sorted((getattr(t.record, x), getattr(t.record, quantity)) for t in some if t.label == name)
        for name in dict.fromkeys(t.label for t in some)
    }
    draw_lines(axes, results, lines)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    plain_ticks(axes.yaxis)
    counts = {"batch": "batch, rows", "context": "context, tokens"}
    label_axes(axes, f"{counts[x]} ({fixed} {most:,})", unit)
    legend_above(figure)
    return Chart(figure, f"At {fixed} {most:,}. " + ends_finding(lines, x, unit, best))


def over_context(results: Results) -> Chart | None:
    return over(results, "context", "batch", "time_per_token_ms", "ms per step", min)


def over_batch(results: Results) -> Chart | None:
    return over(results, "batch", "context", "tokens_per_sec", "tokens per second", max)


def at_the_limit(results: Results) -> Chart | None:
    """Plot tokens per second with as many rows as fit into the device's memory."""
    some = [t for t in measured(results) if t.record.largest_batch]
    if not some:
        return None
    figure, axes = axes_of(WIDTH, 1 + 0.5 * len(some))
    rates = [float(t.record.tokens_per_sec or 0) for t in some]
    colours = [series_of(results, t.label).colour for t in some]
    bars = axes.barh(range(len(some)), rates, color=colours, height=0.6)
    names = [f"{short(t.label)}\n{t.record.batch:,} rows of {t.record.context:,}" for t in some]
    axes.set_yticks(range(len(some)), names)
    axes.bar_label(bars, labels=[f"{rate:,.0f}" for rate in rates], padding=4, color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:,g}")
    label_axes(axes, "tokens per second", "")
    said = [f"{t.label}, {rate:,.0f} tokens per second with {t.record.batch:,} rows" for t, rate in zip(some, rates)]
    most, least = rates.index(max(rates)), rates.index(min(rates))
    slowest = f" Slowest: {said[least]}." if len(some) > 1 else ""
    return Chart(figure, f"Fastest: {said[most]}.{slowest}")


def layer_errors(results: Results) -> Chart | None:
    """Plot the error of each layer's attention output after the conversion, or of its keys and of its values."""
    panels: dict[str, Lines] = {}
    for name, conversion in results.conversions.items():
        if name in results.trainings:  # a trained checkpoint has its student's conversion
            continue
        found = conversion.layers
        fitted = any(layer.attention_error is not None for layer in found)
        for stack in dict.fromkeys(layer.stack for layer in found):
            for key, title in LAYER_ERRORS.items():
                errors = (getattr(layer, key) for layer in found if layer.stack == stack)
                values = [error for error in errors if error is not None]
                shown = key.endswith("attention_error") if fitted else True
                if shown and len(values) > 1 and any(values):
                    panel = panels.setdefault(f"{title}, encoder" if stack == "encoder" else title, {})
                    panel[name] = [(float(i), value) for i, value in enumerate(values, 1)]
    if not panels:
        return None
    figure, below_each_other = rows_of_axes(len(panels), WIDTH, max(HEIGHT, 1.7 * len(panels) + 0.6))
    said = []
    for axes, (title, lines) in zip(below_each_other, panels.items()):
        draw_lines(axes, results, lines)
        axes.set_ylim(0, 1.1 * max(y for points in lines.values() for _, y in points if math.isfinite(y)))
        axes.set_title(f"Error of {title}", color=INK, fontsize=TEXT, loc="left")
        label_axes(axes, "", "relative error")
        means = {name: sum(y for _, y in points) / len(points) for name, points in lines.items()}
        low, high = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
        ends = f"{means[low]:.2f} ({low})" + (f" to {means[high]:.2f} ({high})" if low != high else "")
        said.append(f"Mean error of {title}: {ends}.")
    below_each_other[-1].xaxis.get_major_locator().set_params(integer=True)
    label_axes(below_each_other[-1], "layer", "relative error")
    legend_above(figure)
    return Chart(figure, " ".join(said))


def context_loss(results: Results) -> Chart | None:
    """Plot the loss over the number of tokens before the predicted one."""
    if not any(len(c.loss_by_context) > 1 for c in results.checkpoints):
        return None
    figure, axes = axes_of()
    lines = {
        c.name: [(math.sqrt(row.first * row.last), row.loss) for row in c.loss_by_context]
        for c in results.checkpoints
        if c.loss_by_context
    }
    draw_lines(axes, results, lines)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,g}")
    label_axes(axes, "tokens before the predicted token", "loss, nats per token")
    legend_above(figure)
    return Chart(figure, ends_finding(lines, "context", "nats per token", min))


def training_lines(results: Results) -> dict[str, dict[tuple[str, bool], list[tuple[float, float]]]]:
    """Points (trained tokens, loss), by kind of loss, then by name and whether it is on validation text."""
    kinds: dict[str, dict[tuple[str, bool], list[tuple[float, float]]]] = {}
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
                    kinds.setdefault(loss, {})[name, held_out] = points
    return {loss: kinds[loss] for loss in ("lm", "kl") if loss in kinds}


def training_curves(results: Results) -> Chart | None:
    """Plot losses over the tokens of uptraining: training as lines, validation as points."""
    from matplotlib.ticker import EngFormatter

    kinds = training_lines(results)
    if not any(len(points) > 1 for lines in kinds.values() for points in lines.values()):
        return None
    figure, below_each_other = rows_of_axes(len(kinds), WIDTH, 2.3 * len(kinds) + 0.8)
    said = []
    for axes, (loss, lines) in zip(below_each_other, kinds.items()):
        for (name, held_out), points in lines.items():
            look = series_of(results, name)
            style = {"marker": look.marker, "ls": ":"} if held_out else {"lw": 1, "ls": look.dashes}
            label = f"{short(name)}, {'validation' if held_out else 'training'}"
            axes.plot(*zip(*points), label=label, color=look.colour, **style)
        what = {"lm": "loss", "kl": "KL to the original"}[loss]
        label_axes(axes, "", f"{what}, nats")
        compared = {name: points for (name, held_out), points in lines.items() if held_out}
        kind = "validation" if compared else "training"
        compared = compared or {name: points for (name, _), points in lines.items()}
        best = min(compared, key=lambda name: compared[name][-1][1])
        start, end = compared[best][0][1], compared[best][-1][1]
        said.append(f"Lowest {kind} {what} at the end: {end:.3f} nats ({best}), from {start:.3f} at the start.")
    label_axes(below_each_other[-1], "tokens of training", below_each_other[-1].get_ylabel())
    below_each_other[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_above(figure)
    return Chart(figure, " ".join(said))


TRADE = (
    "Further left is cheaper. The dotted line is the Pareto front: no checkpoint is both better and cheaper than one "
    "on it. Bars are 95% confidence intervals."
)
# File name, heading, note, function that draws it.
PICTURES: tuple[tuple[str, str, str, Callable[[Results], Chart | None]], ...] = (
    ("quality-time", "Quality and time per step", TRADE, time_trade),
    ("quality-cache", "Quality and cache size", TRADE, cache_trade),
    ("time-context", "Time by context", "Each step reads the cache of all earlier tokens.", over_context),
    (
        "tokens-batch",
        "Throughput by batch",
        "The rows of a batch share one read of the weights. Each row has its own cache.",
        over_batch,
    ),
    ("largest-batch", "Throughput at the memory limit", "The batch has as many rows as fit in memory.", at_the_limit),
    ("context-loss", "Loss by context", "Loss on tokens that have more or fewer tokens before them.", context_loss),
    ("layers", "Error by layer", "Error of the conversion, before any training.", layer_errors),
    ("training", "Uptraining", "Losses by the number of tokens that were trained on.", training_curves),
)


def svg(figure: Any) -> str:
    """The picture as SVG in a page, in the colours of its text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = in_page_colours(buffer.getvalue())
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    # The page sets its size.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def described(drawn: str, name: str, title: str, text: str) -> str:
    """Give an SVG a title and a description; its identifiers begin with its name."""
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", drawn)  # identifiers on a page must differ
    begin, rest = drawn.split(">", 1)
    label = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    title, text = escape(title), escape(text)
    return f'{begin} {label}><title id="{name}-title">{title}</title><desc id="{name}-desc">{text}</desc>{rest}'


def draw_pictures(results: Results, directory: Path) -> list[dict[str, str]]:
    """Draw all pictures that the results allow: as PNG in `directory`, and as SVG for the page."""
    found = []
    for name, title, says, draw in PICTURES:
        chart = draw(results)
        if chart is None:
            continue
        drawn = described(svg(chart.figure), name, title, f"{chart.finding} {says}")
        found.append({"name": name, "title": title, "says": says, "finding": chart.finding, "svg": drawn})
        chart.figure.savefig(directory / f"{name}.png", dpi=180, facecolor="white")
    return found
