"""Tables and figures of docs/reproduction.md, from the results (docs/reproduction/*.jsonl).

The page is prose with blocks between `<!-- NAME -->` and `<!-- end -->`, which are generated here.
"""

import math
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from mqa_hf.base import figures
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole
from mqa_hf.base.options import Job, Option

from .experiments import read_lines
from .recipe import FIRST

FILES = ("results.jsonl", "cost.jsonl")
Record = dict[str, Any]
# Two-sided 95% quantiles of Student's t by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Heads of a reduced model by what its name begins with; then the paper's numbers (arXiv 1911.02150): table 1, of
# translation: ln(perplexity), BLEU on development data, on test data greedily and with 4 beams; table 3, of a language
# model: perplexity; table 2: microseconds per output token on a TPUv2: training; encoder and decoder, greedy; beam 4.
REDUCED = {"1 head of": 1, "2 heads of": 2, "4 heads of": 4, "8 heads of": 8}
PAPER_TRANSLATION: dict[Any, tuple[float | None, ...]] = {
    FIRST: (1.424, 26.7, 27.7, 28.4),
    "multi-query": (1.439, 26.5, 27.5, 28.5),
    "multi-head local": (1.427, 26.6, 27.5, 28.3),
    "multi-query local": (1.437, 26.5, 27.6, 28.2),
    1: (1.518, 25.8, None, None),
    2: (1.480, 26.2, 26.8, 27.9),
    4: (1.488, 26.1, None, None),
    8: (1.513, 25.8, None, None),
}
PAPER_LANGUAGE: dict[Any, float] = {FIRST: 29.9, "multi-query": 30.2, 1: 31.2, 2: 31.1, 4: 31.0, 8: 30.9}
PAPER_COST = {
    FIRST: (13.2, 1.7, 46, 2.0, 203),
    "multi-query": (13.0, 1.5, 3.8, 1.6, 32),
    "multi-head local": (13.2, 1.7, 23, 1.9, 47),
    "multi-query local": (13.0, 1.5, 3.3, 1.6, 16),
}
STYLES = {
    "original": {"color": "black", "ls": "--"},
    "mean": {"color": "tab:orange", "ls": ":"},
    "first": {"color": "tab:red", "ls": ":"},
    "random": {"color": "tab:gray", "ls": ":"},
    "shared": {"color": "tab:blue", "ls": "-"},
    "shared, width": {"color": "tab:green", "ls": "-", "label": "shared, one wider head"},
}
TITLES = {"language": "language model"}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95% interval over seeds (Student's t); `None` for a single value."""
    if len(values) < 2:
        return values[0], None
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half


def seeds_of(records: Sequence[Record]) -> list[int]:
    return sorted({r["seed"] for r in records})


def cell(values: Sequence[float], form: str, seeds: Sequence[int]) -> str:
    """`mean ± half` on one line, with the number of values if the table has more seeds; empty without values."""
    if not values:
        return ""
    middle, half = spread(values)
    made = format(middle, form)
    if half is not None:
        made += f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{half:{form.lstrip('+')}}"
    return made if len(values) == len(seeds) else f"{made} ({len(values)})"


def said(seeds: Sequence[int], more: str = "") -> str:
    """The sentence below a table: its seeds, and `more`."""
    return f"\n\nSeeds {', '.join(map(str, seeds))}{more}."


def of(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """Records with these fields, ordered by seed."""
    found = [r for r in records if all(r.get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda r: r.get("seed", 0))


def originals(records: Sequence[Record], task: str) -> dict[int, Record]:
    """The first model of each seed."""
    return {r["seed"]: r for r in of(records, task=task, table="models", model=FIRST)}


def differences(these: Sequence[Record], first: dict[int, Record], field: str) -> list[float]:
    """Difference of a field from the first model's with the same seed."""
    return [r[field] - first[r["seed"]][field] for r in these if r["seed"] in first]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper_key(model: str) -> Any:
    """Key of the paper's numbers: a name, or the heads of a reduced model."""
    return next((heads for start, heads in REDUCED.items() if model.startswith(start)), model)


def rank(model: str) -> tuple[int, str]:
    """Position of a model in a table, as in the paper's."""
    names, key = [*PAPER_COST, *REDUCED.values()], paper_key(model)
    return names.index(key) if key in names else len(names), model


def shown(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def translates(records: Sequence[Record]) -> bool:
    return any("test_bleu_greedy" in r for r in records)


def quality(records: Sequence[Record], task: str) -> str:
    """Tables 1 or 3 of the first paper; its numbers stand beside those of the recipes that follow it."""
    records, first = of(records, task=task, table="models"), originals(records, task)
    pairs, seeds = translates(records), seeds_of(records)
    header = ["", "d_ff", "ln(perplexity)", "above multi-head"]
    header += ["BLEU, dev", "BLEU, test", "beam 4"] if pairs else ["perplexity", "above multi-head"]
    if task == "translation":
        header += ["paper: ln(perplexity)", "above multi-head", "BLEU, dev / test / beam 4"]
    if task == "language":
        header += ["paper: perplexity", "above multi-head"]
    rows = []
    for model in sorted({r["model"] for r in records}, key=rank):
        these, key = of(records, model=model), paper_key(model)
        above = [] if model == FIRST else differences(these, first, "loss")
        row = [model, f"{these[0]['intermediate_size']:,}"]
        row += [cell([r["loss"] for r in these], ".3f", seeds), cell(above, "+.3f", seeds)]
        if pairs:
            fields = ("validation_bleu_greedy", "test_bleu_greedy", "test_bleu_beam")
            row += [cell([r[name] for r in these], ".1f", seeds) for name in fields]
        else:
            row.append(cell([math.exp(r["loss"]) for r in these], ".2f", seeds))
            row.append(f"{statistics.fmean(map(math.exp, above)) - 1:+.1%}" if above else "")
        if task == "translation":
            loss, *bleu = PAPER_TRANSLATION.get(key, (None,) * 4)
            best = PAPER_TRANSLATION[FIRST][0]
            row.append(shown(loss, ".3f"))
            row.append("" if loss is None or best is None or model == FIRST else f"{loss - best:+.3f}")
            row.append(" / ".join(shown(b, ".1f") for b in bleu if b is not None))
        if task == "language":
            there = PAPER_LANGUAGE.get(key)
            row.append(shown(there, ".1f"))
            row.append("" if there is None or model == FIRST else f"{there / PAPER_LANGUAGE[FIRST] - 1:+.1%}")
        rows.append(row)
    sizes = [r["parameters"] for r in records]
    size = f"{min(sizes):,}" + (f" to {max(sizes):,}" if min(sizes) < max(sizes) else "")
    return markdown(header, rows) + said(seeds, f"; {size} parameters each")


def cost(records: Sequence[Record]) -> str:
    """Table 2 of the first paper: microseconds per output token."""
    header = ["", "training", "encoder", "decoder, greedy (floor)", "beam 4 (floor)"]
    header += ["paper: training", "encoder + decoder, greedy", "beam 4"]
    rows = []
    decoding: dict[str, list[float]] = {}
    for model in sorted({r["model"] for r in records}, key=rank):
        both = [of(records, model=model, beams=beams)[0] for beams in (1, 4)]
        encoder = 1e6 * both[0]["encoder_sec"] / both[0]["batch"] / both[0]["length"]
        decoding[model] = [1000 * r["time_per_token_ms"] / r["batch"] for r in both]
        row = [model, f"{both[0]['training_us_per_token']:.2f}", f"{encoder:.2f}"]
        floors = [1000 * r["floor_ms"] / r["batch"] for r in both]
        row += [f"{us:.2f} ({floor:.2f})" for us, floor in zip(decoding[model], floors)]
        training, *theirs = PAPER_COST[model]
        row += [f"{training}", f"{theirs[0]} + {theirs[1]}", f"{theirs[2]} + {theirs[3]}"]
        rows.append(row)
    ratios = [a / b for a, b in zip(decoding[FIRST], decoding["multi-query"])]
    theirs = [PAPER_COST[FIRST][i] / PAPER_COST["multi-query"][i] for i in (2, 4)]
    bold = [f"**{r:.1f}**" for r in ratios], [f"**{r:.1f}** (decoder)" for r in theirs]
    rows.append(["**multi-head : multi-query**", "", "", *bold[0], "", *bold[1]])
    return markdown(header, rows)


def operations(records: Sequence[Record]) -> str:
    """Bytes that a decode step reads, and operations of a training token."""
    header = ["", "bytes a step, greedy", "beam 4", "share of copy bandwidth, greedy", "beam 4"]
    header += ["training: operations per token", "model FLOP utilisation"]
    rows = []
    for model in sorted({r["model"] for r in records}, key=rank):
        both = [of(records, model=model, beams=beams)[0] for beams in (1, 4)]
        share = [r["bytes_per_step"] / r["copy_bandwidth"] / (r["time_per_token_ms"] / 1000) for r in both]
        row = [model, *(f"{r['bytes_per_step'] / 1e9:.2f} GB" for r in both), *(f"{s:.0%}" for s in share)]
        row += [f"{both[0]['training_operations_per_token'] / 1e9:.2f} · 10⁹", shown(both[0]["training_mfu"], ".0%")]
        rows.append(row)
    return markdown(header, rows)


def conversions(records: Sequence[Record], task: str) -> str:
    """Loss above the original's after shares of the pretraining tokens; also BLEU for translations."""
    found, first = of(records, task=task, table="conversions"), originals(records, task)
    shares = sorted({r["share"] for r in found})
    models = {model: of(found, model=model) for model in dict.fromkeys(r["model"] for r in found)}
    seeds = seeds_of(found)

    def cells(these: Sequence[Record], field: str, form: str) -> list[str]:
        return [cell(differences(of(these, share=share), first, field), form, seeds) for share in shares]

    header = ["", "trained on", "cache, bytes per token", *(f"{share:.0%}" for share in shares)]
    rows = []
    for model, these in models.items():
        row = [model, these[0]["loss_function"].upper(), f"{these[0]['cache_bytes']:,}"]
        rows.append(row + cells(these, "loss", "+.3f"))
    made = markdown(header, rows) + said(seeds)
    if translates(found):
        header = ["BLEU, test, greedy", *header[3:]]
        rows = [[model, *cells(these, "test_bleu_greedy", "+.1f")] for model, these in models.items()]
        made += "\n\n" + markdown(header, rows)
    return made


def times(records: Sequence[Record], task: str) -> str:
    """Milliseconds per step."""
    found = of(records, task=task, table="times")
    header = ["", "batch", "context or source", "beams", "ms a step", "floor", "faster than the original"]
    rows = []
    for r in found:
        same = {name: r[name] for name in ("batch", "context", "beams")}
        first = of(found, model=FIRST, **same)
        row = [" · ".join(m for m in r["models"] if m != "original"), f"{r['batch']:,}"]
        row += [f"{r.get('source', r['context']):,}", str(r["beams"])]
        row += [f"{r['time_per_token_ms']:.2f}", f"{r['floor_ms']:.2f}"]
        row.append(f"{first[0]['time_per_token_ms'] / r['time_per_token_ms']:.2f}×" if first else "")
        rows.append(row)
    return markdown(header, rows)


def line_of(model: str) -> str:
    """The line of a figure that a conversion belongs to."""
    return "shared, width" if "width" in model else model.split(",")[0]


class Panel:
    """A panel of a figure: the difference of a field of a task's conversions from the original's.

    Args:
        field: loss, or test_bleu_greedy.
    """

    def __init__(self, records: Sequence[Record], task: str, field: str):
        self.field, self.title = field, TITLES.get(task, task) + (", BLEU" if "bleu" in field else "")
        self.first = originals(records, task)
        self.found = of(records, task=task, table="conversions")
        self.models = list(dict.fromkeys(r["model"] for r in self.found))
        self.times = of(records, task=task, table="times", beams=1)
        self.cache = {r["model"]: r["cache_bytes"] for r in self.found}
        # The first model and a conversion with all its heads have the same shape.
        self.seconds = {model: r["time_per_token_ms"] for r in self.times for model in r["models"]}

    def draw(self, axes: Any, points: Sequence[tuple[float, str, float]], line: str, **style: Any) -> None:
        """Draw measured points (x, model, share), with intervals over seeds."""
        known = [
            (x, *spread(values))
            for x, model, share in sorted(points)
            if (values := differences(of(self.found, model=model, share=share), self.first, self.field))
        ]
        if known:
            xs, middle, half = zip(*((x, mean, error or 0.0) for x, mean, error in known))
            options = {"marker": "o", "ms": 4, "lw": 1.5, "capsize": 2, "label": line, **STYLES.get(line, {}), **style}
            axes.errorbar(xs, middle, yerr=half, **options)

    def over_shares(self, axes: Any) -> str:
        """Draw the panel over the share of training; return the label of that axis."""
        for model in (m for m in self.models if "," not in m):
            shares = sorted({r["share"] for r in of(self.found, model=model)})
            self.draw(axes, [(100 * s, model, s) for s in shares if s or model != "original"], model)
        if self.field == "loss":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.yaxis.set_major_formatter("{x:g}")
        return "tokens of training, % of the pretraining"

    def over_sizes(self, axes: Any, kind: str) -> str:
        """Draw the panel over `kind` (cache or time) after 5% of the tokens; return the label of that axis."""
        sizes = self.cache if kind == "cache" else self.seconds
        for line in ("mean", "shared", "shared, width"):
            members = [m for m in self.models if line_of(m) == line or m == line.split(",")[0]]
            self.draw(axes, [(sizes[m], m, 0.05) for m in members if m in sizes], line)
        if "original" in sizes:
            self.draw(axes, [(sizes["original"], "original", 0.05)], "original", marker="s", ls="")
        if kind == "cache":
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(set(sizes.values())), minor=False)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            return "cache, bytes per token"
        axes.set_xlim(left=0)
        return f"ms per step of {self.times[0]['batch']:,} rows, greedy"


def picture(records: Sequence[Record], kind: str, path: Path) -> None:
    """Draw a figure of the GQA paper with panels for each task: how much worse conversions are than the original, over
    the share of training or, after 5%, over cache bytes or step time."""
    converted = of(records, table="conversions")
    panels = [
        Panel(records, task, field)
        for task in dict.fromkeys(r["task"] for r in converted)
        for field in ("loss", "test_bleu_greedy")
        if field == "loss" or translates(of(converted, task=task))
    ]
    if kind == "time":
        panels = [panel for panel in panels if panel.times]
    if not panels:
        return
    figure, places = figures.panels(len(panels), 4.4, 3.8)
    handles: dict[str, Any] = {}
    for axes, panel in zip(places, panels):
        axes.axhline(0, color="black", lw=0.6)
        x = panel.over_shares(axes) if kind == "share" else panel.over_sizes(axes, kind)
        y = "loss above the original's, nats a token" if panel.field == "loss" else "BLEU above the original's, test"
        figures.describe(axes, x, y, panel.title, legend=False)
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines))
    figure.legend(handles.values(), handles, **figures.NOTE, loc="outside lower center", ncols=len(handles))
    figures.save(figure, path)


def read(path: Path) -> list[Record]:
    if not path.is_file():
        raise MQAError(f"{path} does not exist; make it with python -m mqa_hf.eval.reproduction run and cost")
    return read_lines(path)


def blocks(directory: Path) -> dict[str, Callable[[], str]]:
    """Functions that make the blocks of the page, by name."""
    results, costs = map(read, (directory / name for name in FILES))
    found: dict[str, Callable[[], str]] = {"cost": lambda: cost(costs), "operations": lambda: operations(costs)}
    for task in dict.fromkeys(r["task"] for r in results):
        for name, make in (("quality", quality), ("conversions", conversions), ("times", times)):
            found[f"{name} {task}"] = lambda make=make, task=task: make(results, task)  # type: ignore[misc]
    return found


def filled(page: str, directory: Path) -> str:
    """Regenerate the blocks of the page.

    Raises:
        MQAError: for a block without results.
    """
    makers = blocks(directory)

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in makers:
            raise MQAError(f"nothing was measured for {name!r}; there is {', '.join(makers)}")
        return f"<!-- {name} -->\n\n{makers[name]()}\n\n<!-- end -->"

    return re.sub(
        r"<!-- ((?:quality|conversions|times|cost|operations)[^>]*?) -->\n.*?<!-- end -->", block, page, flags=re.S
    )


@dataclass(frozen=True)
class Page(Job[None]):
    """Make the tables and figures of reproduction.md from reproduction/*.jsonl beside it."""

    name = "page"

    docs: Annotated[Path, Option("Directory with reproduction.md.")]
    _: KW_ONLY
    work: Annotated[Path | None, Option("First copy results.jsonl and cost.jsonl from here.")] = None

    def run(self) -> None:
        page, directory = self.docs / "reproduction.md", self.docs / "reproduction"
        if not page.is_file():
            raise MQAError(f"{page} does not exist")
        measured = [] if self.work is None else [self.work / name for name in FILES]
        for path in measured:
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
        write_whole(page, filled(page.read_text(encoding="utf-8"), directory))
        results = read(directory / FILES[0])
        for kind in ("share", "cache", "time"):
            picture(results, kind, directory / f"{kind}.png")
