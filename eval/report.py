"""Quality against speed on one page: `mqa-hf report`.

    mqa-hf evaluate ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation
    mqa-hf benchmark ORIGINAL CONVERTED ... --kv-heads original --engines mqa-hf --output benchmark.jsonl
    mqa-hf report evaluation --benchmark benchmark.jsonl --output report

writes `report/index.html`, which needs no network and no other file, its pictures as PNGs, and `report/report.json`.
What a checkpoint's `conversion.json` and `uptraining.json` say is in there too.
"""

import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_json, write_whole

PAGE = "index.html"
CARD_HEADING = "## Quality and speed"
INK = "#123456"  # stands for the colour of the page's text in pictures, light or dark
COLOURS = ("#8a8f98", "#d1495b", "#2a9d8f", "#e09f3e", "#5b7db1", "#9b5de5", "#6a994e", "#c77dff")
NO_SHAPE = ("_name_or_path", "transformers_version", "dtype", "rope_frequencies")  # of what is in config.json
DECIDING = 2  # columns of quality before those of cost; the others come after
STYLES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)))
LAYER_ERRORS = {
    "attention_error": "attention output",
    "key_error": "keys",
    "value_error": "values",
    "cross_attention_error": "cross-attention output",
    "cross_key_error": "keys, cross-attention",
    "cross_value_error": "values, cross-attention",
}

# What a report reads, for [`checked`].
NUMBERS = ("loss", "loss_above_original", "perplexity", "bits_per_byte", "kl", "same_first_choice")
NEXT_TOKEN = dict.fromkeys((*NUMBERS, "tokens", "documents"), 0.0) | {"loss_interval": None}
EVALUATION = {
    "settings": {"text": None, "beams": None},
    "versions": {},
    "checkpoints": [
        {
            "name": "",
            "checkpoint": "",
            "next_token": NEXT_TOKEN,
            "loss_by_context": [{"from": 0.0, "to": 0.0, "loss": 0.0}],
        }
    ],
}
TIMING = {"shape": "", "model": "", "engine": "", "device": "", "batch": 0.0, "context": 0.0}
TIMES = {"time_per_token_ms": 0.0, "tokens_per_sec": 0.0}
BESIDE: dict[str, dict[str, Any]] = {
    REPORT_FILE: {"layers?": [{}]},
    TRAINING_FILE: {"tokens": 0.0, "log": {"main?": [{"step": 0.0}]}},
}


@dataclass(frozen=True)
class Data:
    """All that a report shows.

    Attributes:
        evaluation: what `mqa-hf evaluate` has written.
        timings: records of `mqa-hf benchmark`, with the checkpoint's `name` where it is one of the evaluation.
        timed_as: the name of a checkpoint that was timed, for each one of the same shape that was not.
        conversions, trainings: by name of the checkpoint, what stands beside its weights.
    """

    evaluation: dict[str, Any]
    timings: list[dict[str, Any]]
    timed_as: dict[str, str]
    conversions: dict[str, dict[str, Any]]
    trainings: dict[str, dict[str, Any]]

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        return self.evaluation["checkpoints"]

    def colour(self, name: str) -> str:
        names = [c["name"] for c in self.checkpoints]
        names += sorted({label(r) for r in self.timings} - set(names))
        return COLOURS[names.index(name) % len(COLOURS)]


def read_results(evaluation: Path, benchmarks: Sequence[Path]) -> Data:
    """Everything that is known of the checkpoints of an evaluation.

    Args:
        evaluation: `evaluation.json`, or the directory that holds it.
        benchmarks: files of `mqa-hf benchmark --output`.

    Raises:
        MQAError: where there are no such results.
    """
    path = evaluation / "evaluation.json" if evaluation.is_dir() else evaluation
    what = f"{path} holds no results of mqa-hf evaluate"
    try:
        found = checked(what, json.loads(path.read_text(encoding="utf-8")), EVALUATION)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MQAError(f"{what}: {error}") from error
    if not found["checkpoints"]:
        raise MQAError(f"{what}: it has no checkpoints")
    names = {Path(c["checkpoint"]): c["name"] for c in found["checkpoints"]}
    given = {c.get("given"): c["name"] for c in found["checkpoints"]}
    timings: list[dict[str, Any]] = []
    for file in benchmarks:
        what = f"{file} holds no results of mqa-hf benchmark"
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise MQAError(f"{what}: {error}") from error
        for line in lines:
            checked(what, line, TIMING if "error" in checked(what, line, {}) else TIMING | TIMES)
            # With fewer heads than the checkpoint has, it is of another model.
            name = names.get(Path(line["shape"]).resolve()) or given.get(line["shape"])
            timings.append({**line, "name": name if line.get("original", True) else None})
    beside: dict[str, dict[str, dict[str, Any]]] = {REPORT_FILE: {}, TRAINING_FILE: {}}
    for directory, name in names.items():
        for file_name, entries in beside.items():
            path = directory / file_name
            if path.is_file():
                entries[name] = checked(f"{path} is not whole", read_json(path), BESIDE[file_name])
    timed = {r["name"] for r in timings if "error" not in r and r["engine"] == "mqa-hf"}
    shapes = {name: shape_of(directory) for directory, name in names.items()}
    measured = {shape: name for name, shape in shapes.items() if name in timed}
    timed_as = {n: measured[shape] for n, shape in shapes.items() if n not in timed and shape in measured}
    return Data(found, timings, timed_as, beside[REPORT_FILE], beside[TRAINING_FILE])


def checked(what: str, found: Any, like: Any, place: str = "") -> Any:
    """`found`, where it is like `like`: an object with (at least) these names, a list of such entries, the same types.

    Args:
        what: is wrong with a file where it is not so.
        found: of a JSON file.
        like: `None` for anything; names that end with "?" may be missing.
        place: of `found` in the file.

    Raises:
        MQAError: for what is missing or of another type.
    """
    kinds = {dict: "object", list: "list", str: "text", float: "number"}
    fits = isinstance(found, int | float) if isinstance(like, float) else isinstance(found, type(like))
    if like is not None and not fits:
        raise MQAError(f"{what}: {place or 'it'} is no {kinds[type(like)]}")
    if isinstance(like, list):
        for i, part in enumerate(found):
            checked(what, part, like[0], f"{place}[{i}]")
    for name, part in like.items() if isinstance(like, dict) else ():
        key, inside = name.removesuffix("?"), f"{place}.{name}".strip(".?")
        if key in found:
            checked(what, found[key], part, inside)
        elif key == name:
            raise MQAError(f"{what}: {inside} is missing")
    return found


def shape_of(directory: Path) -> str:
    """What decides how long a step takes."""
    path = directory / "config.json"
    said = read_json(path) if path.is_file() else {"directory": str(directory)}
    return json.dumps({name: value for name, value in said.items() if name not in NO_SHAPE}, sort_keys=True)


def label(record: dict[str, Any]) -> str:
    """What a timing is of: the checkpoint, or shape and model; the engine where it is not this package's."""
    if record["name"]:
        return record["name"] if record["engine"] == "mqa-hf" else f"{record['name']}, {record['engine']}"
    return f"{Path(record['shape']).name}: {record['model']}"


def good(data: Data) -> list[dict[str, Any]]:
    return [r for r in data.timings if "error" not in r]


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


def finish(axes: Any, x: str, y: str, legend: bool = False) -> None:
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


def quality(data: Data) -> tuple[dict[str, tuple[float, float, float]], str, int]:
    """The number that checkpoints are compared by, with its interval; what it is; and 1 where less is better, else -1.

    BLEU with beams where there are translations, word errors where there are transcripts, else the loss.
    """
    first = data.checkpoints[0]
    kind, name, title, sign = "next_token", "loss", "held-out loss, nats a token", 1
    for metric, said, better in (("bleu", "BLEU", -1), ("word_error_rate", "word errors", 1)):
        if metric in first.get("beam", {}):
            kind, name, sign = "beam", metric, better
            title = f"{said}, beam {data.evaluation['settings']['beams']}"
    found = {}
    for c in data.checkpoints:
        value = c[kind][name]
        low, high = c[kind][f"{name}_interval"] or (value, value)
        found[c["name"]] = (value, min(low, value), max(high, value))
    return found, title, sign


def trade(data: Data, points: dict[str, float], what: str) -> Any:
    """Quality over a cost, one point a checkpoint, the Pareto front as a line."""
    if len(points) < 2:
        return None
    figure, axes = axes_of()
    found, title, sign = quality(data)
    line = front([(x, sign * found[name][0]) for name, x in points.items()])
    axes.plot([x for x, _ in line], [sign * y for _, y in line], color=INK, lw=1, ls=":", zorder=1)
    below: list[tuple[float, float]] = []  # points that another one's name would lie over
    for name, x in points.items():
        y, low, high = found[name]
        near = any(math.isclose(x, a, rel_tol=0.05) and math.isclose(y, b, rel_tol=0.05) for a, b in below)
        below.append((x, y))
        error = [[y - low], [high - y]]
        axes.errorbar([x], [y], yerr=error, marker="o", ms=7, color=data.colour(name), capsize=3)
        place = (7, -13 if near else 5)
        axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=10, color=INK)
    axes.margins(0.18)
    if title.startswith("held-out"):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    finish(axes, what, title)
    return figure


def cache_trade(data: Data) -> Any:
    sizes = {c["name"]: c["kv_bytes_per_token"] for c in data.checkpoints if c.get("kv_bytes_per_token")}
    return trade(data, sizes, "cache, bytes a token (16 bit)")


def cells(data: Data) -> list[tuple[int, int]]:
    """Batch and context of the timings that all checkpoints with timings share, the largest last."""
    by_name: dict[str, set[tuple[int, int]]] = {}
    for r in good(data):
        if r["name"] and r["engine"] == "mqa-hf" and r.get("beams", 1) == 1 and not r.get("largest_batch"):
            by_name.setdefault(r["name"], set()).add((r["batch"], r["context"]))
    shared = set.intersection(*by_name.values()) if by_name else set()
    return sorted(shared, key=lambda cell: (cell[0] * cell[1], cell))


def time_of(data: Data, cell: tuple[int, int]) -> dict[str, float]:
    """Milliseconds a step, by checkpoint."""
    measured = {
        r["name"]: r["time_per_token_ms"]
        for r in good(data)
        if r["name"] and r["engine"] == "mqa-hf" and (r["batch"], r["context"]) == cell and r.get("beams", 1) == 1
    }
    names = [c["name"] for c in data.checkpoints]
    found = {name: measured.get(data.timed_as.get(name, name)) for name in names}
    return {name: time for name, time in found.items() if time is not None}


def time_trade(data: Data) -> Any:
    if not cells(data):
        return None
    batch, context = cells(data)[-1]
    where = good(data)[0]["device"]
    return trade(data, time_of(data, (batch, context)), f"ms a step of {batch} rows at context {context:,} ({where})")


def over(data: Data, x: str, fixed: str, quantity: str, what: str) -> Any:
    """A time over the batch or the context, with the other at its most frequent value."""
    some = [r for r in good(data) if not r.get("largest_batch") and r.get("beams", 1) == 1]
    values = [r[fixed] for r in some]
    if not some:
        return None
    most = max(sorted(set(values)), key=values.count)
    some = [r for r in some if r[fixed] == most]
    if len({r[x] for r in some}) < 2:
        return None
    figure, axes = axes_of()
    for name in dict.fromkeys(map(label, some)):
        points = sorted((r[x], r[quantity]) for r in some if label(r) == name)
        axes.plot(
            [a for a, _ in points], [b for _, b in points], marker="o", ms=4, label=name, color=data.colour(name)
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    plain_ticks(axes.yaxis)
    finish(axes, f"{x} ({fixed} {most:,})", what, legend=True)
    return figure


def over_context(data: Data) -> Any:
    return over(data, "context", "batch", "time_per_token_ms", "ms a step")


def over_batch(data: Data) -> Any:
    return over(data, "batch", "context", "tokens_per_sec", "tokens a second")


def at_the_limit(data: Data) -> Any:
    """Tokens a second with as many rows as fit into the device's memory."""
    some = [r for r in good(data) if r.get("largest_batch")]
    if not some:
        return None
    figure, axes = axes_of(5.6, 1 + 0.5 * len(some))
    names = [f"{label(r)}\n{r['batch']:,} rows of {r['context']:,}" for r in some]
    bars = axes.barh(
        names, [r["tokens_per_sec"] for r in some], color=[data.colour(label(r)) for r in some], height=0.6
    )
    axes.bar_label(bars, labels=[f"{r['tokens_per_sec']:,.0f}" for r in some], padding=4, color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    finish(axes, "tokens a second", "")
    return figure


def layers(data: Data) -> Any:
    """The error of each layer's attention output after the conversion, or of its keys and values."""
    lines: list[tuple[str, str, list[float]]] = []
    for name, conversion in data.conversions.items():
        if name in data.trainings:  # its conversion is that of the student
            continue
        found = conversion.get("layers") or []
        fitted = any("attention_error" in layer for layer in found)
        for stack in dict.fromkeys(layer.get("stack") for layer in found):
            for key, title in LAYER_ERRORS.items():
                values = [layer[key] for layer in found if layer.get("stack") == stack and key in layer]
                shown = key.endswith("attention_error") if fitted else True
                if shown and len(values) > 1 and any(values):
                    lines.append((name, f"{title}, encoder" if stack == "encoder" else title, values))
    if not lines:
        return None
    figure, axes = axes_of()
    styles: dict[str, Any] = dict(zip(sorted({title for _, title, _ in lines}), itertools.cycle(STYLES)))
    for name, title, values in lines:
        drawn = {"ls": styles[title], "color": data.colour(name), "label": f"{name}: {title}"}
        axes.plot(range(1, len(values) + 1), values, **drawn)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    finish(axes, "layer", "relative error", legend=True)
    return figure


def by_context(data: Data) -> Any:
    if not any(len(c["loss_by_context"]) > 1 for c in data.checkpoints):
        return None
    figure, axes = axes_of()
    for c in data.checkpoints:
        rows = c["loss_by_context"]
        x = [math.sqrt(r["from"] * r["to"]) for r in rows]
        axes.plot(x, [r["loss"] for r in rows], marker="o", ms=4, label=c["name"], color=data.colour(c["name"]))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    finish(axes, "tokens before the predicted one", "loss, nats a token", legend=True)
    return figure


def training(data: Data) -> Any:
    """Losses over the tokens of uptraining: of training as lines, of validation as points."""
    from matplotlib.ticker import EngFormatter

    lines: list[tuple[str, str, bool, list[tuple[float, float]]]] = []
    for name, found in data.trainings.items():
        if set(found["log"]) != {"main"}:  # stages have losses of their own
            continue
        steps = found["log"]["main"]
        last = max((line["step"] for line in steps), default=0) or 1
        for loss in ("lm", "kl"):
            for key, held_out in ((loss, False), (f"eval_{loss}", True)):
                points = [(line["step"] / last * found["tokens"], line[key]) for line in steps if key in line]
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
                axes.plot(*zip(*points), label=said, color=data.colour(name), **style)
        what = {"lm": "loss", "kl": "KL to the original"}[kind]
        finish(
            axes, "tokens" if axes is below_each_other[-1] else "", f"{what}, nats", legend=axes is below_each_other[0]
        )
    below_each_other[-1].xaxis.set_major_formatter(EngFormatter())
    return figure


TRADE = "Further left is cheaper; no checkpoint is better and cheaper than one on the dotted line, the Pareto front."
# File name, heading, what it says, how it is drawn.
PICTURES: tuple[tuple[str, str, str, Callable[[Data], Any]], ...] = (
    ("quality-time", "Quality against time", TRADE, time_trade),
    ("quality-cache", "Quality against cache", TRADE, cache_trade),
    ("time-context", "Time over context", "A step reads the cache of all earlier tokens.", over_context),
    ("tokens-batch", "Tokens over batch", "Rows share reading the weights, not the cache.", over_batch),
    ("largest-batch", "At the memory limit", "With as many rows as fit.", at_the_limit),
    ("context-loss", "Loss by context", "What longer context brings each model.", by_context),
    ("layers", "Error by layer", "Of the conversion, before any training.", layers),
    ("training", "Uptraining", "Losses over tokens.", training),
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


def pictures(data: Data, directory: Path) -> list[dict[str, str]]:
    """All pictures that the data allow: as PNGs in `directory`, and as SVG for the page."""
    found = []
    for name, title, says, draw in PICTURES:
        figure = draw(data)
        if figure is None:
            continue
        drawn = svg(figure)
        # Identifiers of two pictures on one page must differ.
        drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
        found.append({"name": name, "title": title, "says": says, "svg": drawn})
        figure.savefig(directory / f"{name}.png", dpi=150, facecolor="white")
    return found


def number(found: dict[str, Any], name: str, form: str) -> dict[str, str]:
    """A number and its interval as texts; percent and thousands as `form` says."""
    if found.get(name) is None:
        return {"value": "", "interval": ""}
    interval = found.get(f"{name}_interval") or ()
    ends = [format(x, form) for x in interval if math.isfinite(x)]
    return {"value": format(found[name], form), "interval": " to ".join(ends) if len(ends) == 2 else ""}


def rows(data: Data) -> tuple[list[str], list[dict[str, Any]]]:
    """The head of the table, and a row for each checkpoint."""
    first = data.checkpoints[0]
    # Heading, where the number is found, its name, its form; what decides comes first.
    columns: list[tuple[str, str, str, str]] = [
        ("loss, nats a token", "next_token", "loss", ".3f"),
        ("above the original", "next_token", "loss_above_original", "+.3f"),
        ("perplexity", "next_token", "perplexity", ".2f"),
        ("bits a byte", "next_token", "bits_per_byte", ".3f"),
        ("KL to the original", "next_token", "kl", ".3f"),
        ("same first choice", "next_token", "same_first_choice", ".1%"),
    ]
    if "greedy" in first:
        names = [
            ("bleu", "BLEU", ".1f"),
            ("bleu_above_original", "above the original", "+.1f"),
            ("chrf", "chrF", ".1f"),
        ]
        if "word_error_rate" in first["greedy"]:
            names = [("word_error_rate", "word errors", ".1%")]
        kinds = (("beam", f"beam {data.evaluation['settings']['beams']}"), ("greedy", "greedy"))
        columns = [
            (f"{said}, {title}", kind, name, form) for kind, title in kinds for name, said, form in names
        ] + columns
    elif "writing" in first:
        columns.append(("tokens before it differs", "writing", "agreeing_tokens", ".1f"))
        columns.append(("repetition", "writing", "repetition", ".1%"))
    tasks = [
        (task, metric)
        for task, numbers in first.get("tasks", {}).get("results", {}).items()
        for metric, value in numbers.items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    times = {cell: time_of(data, cell) for cell in dict.fromkeys(cells(data)[:1] + cells(data)[-1:])}
    head = [title for title, *_ in columns]
    costs = ["cache, bytes a token", *(f"ms a step, batch {b}, context {n:,}" for b, n in times)]
    head[DECIDING:DECIDING] = costs
    head += [f"{task}, {metric.removesuffix(',none')}" for task, metric in tasks]
    body = []
    for c in data.checkpoints:
        texts = [number(c.get(part, {}), name, form) for _, part, name, form in columns]
        if c is first:  # which is not above itself
            for i, (_, _, name, _) in enumerate(columns):
                texts[i] = number({}, "", "") if name.endswith("above_original") else texts[i]
        found = [ratio_to(c.get("kv_bytes_per_token"), first.get("kv_bytes_per_token"), ",", "less", "more")]
        found += [
            ratio_to(ms.get(c["name"]), ms.get(first["name"]), ".2f", "faster", "slower") for ms in times.values()
        ]
        texts[DECIDING:DECIDING] = found
        texts += [number(c.get("tasks", {}).get("results", {}).get(task, {}), metric, ".3f") for task, metric in tasks]
        body.append({"name": c["name"], "colour": data.colour(c["name"]), "cells": texts})
    return head, body


def as_text(cell: dict[str, str]) -> str:
    return f"{cell['value']} ({cell['interval']})" if cell["interval"] else cell["value"]


def ratio_to(value: float | None, original: float | None, form: str, less: str, more: str) -> dict[str, str]:
    """A cost, and how many times `less` or `more` than the original's it is."""
    if value is None:
        return {"value": "", "interval": ""}
    share = 1.0 if original is None else original / value
    times, said = (share, less) if share >= 1 else (1 / share, more)
    small = f"{times:.0f} × {said}" if times >= 10 else f"{times:.2g} × {said}"
    return {"value": format(value, form), "interval": small if times > 1.05 else ""}


def add_to_card(
    directory: Path, name: str, data: Data, head: list[str], body: list[dict[str, Any]], shown: Path
) -> None:
    """Put the table, two pictures and `model-index` into a converted checkpoint's `README.md`; those of an earlier
    report make room.

    Args:
        directory: of the checkpoint.
        name: its name in the report.
        head, body: of [`rows`].
        shown: directory of the pictures.
    """
    card = ModelCard.load(directory / "README.md")
    found = next(c for c in data.checkpoints if c["name"] == name)
    text = data.evaluation["settings"]["text"] or "Python's manual"
    kind = "translation" if "greedy" in found else "text-generation"
    metrics = [("loss", found["next_token"]["loss"]), ("perplexity", found["next_token"]["perplexity"])]
    metrics += [(m, found["beam"][m]) for m in ("bleu", "chrf", "word_error_rate") if m in found.get("beam", {})]
    card.data.model_name = card.data.to_dict().get("model_name") or name
    card.data.eval_results = [
        EvalResult(
            task_type=kind, dataset_type="text", dataset_name=Path(text).name, metric_type=m, metric_value=value
        )
        for m, value in metrics
    ]
    lines = [CARD_HEADING, "", "| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in body:
        title = f"**{row['name']}**" if row["name"] == name else row["name"]
        lines.append(f"| {title} | " + " | ".join(map(as_text, row["cells"])) + " |")
    over = found["next_token"].get("intervals_over", "documents")
    lines += [
        "",
        f"Held-out text: {Path(text).name}; in brackets, 95% intervals over {over}, and costs beside the original's.",
        "",
    ]
    for picture in ("quality-time", "quality-cache"):
        if (shown / f"{picture}.png").is_file():
            shutil.copyfile(shown / f"{picture}.png", directory / f"{picture}.png")
            lines += [f"![{picture.replace('-', ' against ')}]({picture}.png)", ""]
    before, _, after = card.text.partition(CARD_HEADING)
    rest = after[after.index("\n## ") :] if "\n## " in after else ""
    card.text = before.rstrip() + "\n\n" + "\n".join(lines) + rest
    card.save(directory / "README.md")


def write_report(
    evaluation: Path, benchmarks: Sequence[Path], output: Path, title: str | None = None, cards: bool = False
) -> Path:
    """Write the page, its pictures and its data to `output`.

    Args:
        evaluation, benchmarks: see [`read_results`].
        output: directory; files of an earlier report are replaced.
        title: of the page.
        cards: whether the model cards of converted checkpoints get the table and pictures, too.

    Returns:
        The page.
    """
    data = read_results(evaluation, benchmarks)
    if output.is_file():
        raise MQAError(f"{output} is a file; give a directory")
    output.mkdir(parents=True, exist_ok=True)
    for name, *_ in PICTURES:
        (output / f"{name}.png").unlink(missing_ok=True)
    head, body = rows(data)
    copied = ["\t".join(["", *head]), *("\t".join([row["name"], *map(as_text, row["cells"])]) for row in body)]
    content = {"evaluation": data.evaluation, "benchmark": data.timings}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("mqa_hf.eval").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    commands = {"evaluation": data.evaluation.get("command")}
    for name in (c["name"] for c in data.checkpoints):
        converted = data.conversions.get(name, {}).get("command")
        if converted not in commands.values():  # a trained checkpoint has that of its student
            commands[name if name not in data.trainings else f"{name}, conversion"] = converted
        if name in data.trainings:
            commands[name] = data.trainings[name].get("command")
    timings = dict.fromkeys(r["command"] for r in data.timings if r.get("command"))
    commands |= {"benchmark" + f" {i}" * bool(i): command for i, command in enumerate(timings)}
    page = template.render(
        title=title or f"{data.checkpoints[0]['name']} and what was made of it",
        head=head,
        rows=body,
        pictures=pictures(data, output),
        evaluation=data.evaluation,
        settings=data.evaluation["settings"],
        samples=[(c["name"], c.get("samples", [])) for c in data.checkpoints],
        commands={name: command for name, command in commands.items() if command},
        device=", ".join(sorted({r["device"] for r in data.timings})),
        timed_as=[
            (" and ".join(n for n, o in data.timed_as.items() if o == other), other)
            for other in dict.fromkeys(data.timed_as.values())
        ],
        copied="\n".join(copied),
        # No tag, nor a comment, which a browser would read a script within to the end of the page.
        data=json.dumps(content, indent=1, ensure_ascii=False).replace("<", "\\u003c"),
    )
    write_whole(output / PAGE, page)
    (output / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if cards:
        for c in data.checkpoints:
            directory = Path(c["checkpoint"])
            if c["name"] in data.conversions and (directory / "README.md").is_file():
                add_to_card(directory, c["name"], data, head, body, output)
    return output / PAGE
