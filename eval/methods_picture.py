"""The results of `methods.py`: a record for each row of its table, and a picture of one or several tables:

python -m mqa_hf.eval.methods_picture results.jsonl --picture methods.png
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from mqa_hf.base.commands import run_job
from mqa_hf.base.errors import MQAError
from mqa_hf.base.figures import NOTE, can_draw, describe, panels, save
from mqa_hf.base.options import Job, Option
from mqa_hf.base.records import Record

LEAST = 1e-3  # nats; smaller differences are drawn at this value


class MethodRecord(Record):
    """A conversion or a peer: its cache bytes per token, time, memory, and loss on each validation text.

    Attributes:
        conversion: "METHOD, setting"; "original" in the first row.
        peer: whether it is an alternative to a conversion (`peers/`).
    """

    file = "results.jsonl"

    conversion: str
    peer: bool = False
    cache_bytes: int
    seconds: float | None = None
    device_gib: float | None = None
    loss: list[float]
    texts: list[str] = []
    source: str = ""

    @property
    def method(self) -> str:
        return self.conversion.partition(", ")[0]


def read(path: Path) -> list[MethodRecord]:
    """Read the records of a file.

    Raises:
        MQAError: if a line is not a record, or the first is not the original's.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise MQAError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise MQAError(f"{path}, line {number}: {error}") from error
        if not isinstance(content, dict):
            raise MQAError(f"{path}, line {number} is no object with fields")
        found.append(MethodRecord.of(content, f"{path}, line {number},"))
    if not found or found[0].conversion != "original":
        raise MQAError(f"{path} holds no results of mqa_hf.eval.methods: its first line is not the original's")
    return found


def check_new(output: Path | None, picture: Path | None) -> None:
    """Raise MQAError if results or a picture cannot be written."""
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise MQAError(f"`output` {output} must be a new file in a directory that is there")
    if picture is not None and not can_draw():
        raise MQAError("`picture` needs matplotlib: pip install 'mqa-hf[benchmark]'")
    if picture is not None and picture.suffix.lower() not in (".png", ".svg"):
        raise MQAError(f"`picture` {picture} must end in .png or .svg")


@dataclass(frozen=True)
class Panel:
    """One model on one text.

    Attributes:
        original, others: rows of its table.
        text: index of the text.
    """

    original: MethodRecord
    others: list[MethodRecord]
    text: int

    def points(self, method: str) -> list[tuple[float, float]]:
        """Cache bytes and loss above the original's of each row of a method, sorted."""
        base, n = self.original.loss[self.text], self.text
        return sorted((r.cache_bytes, max(r.loss[n] - base, LEAST)) for r in self.others if r.method == method)

    @property
    def title(self) -> str:
        text = self.original.texts[self.text] if self.original.texts else ""
        return f"{self.original.source}, {text}: {self.original.loss[self.text]:.3f} nats"


def draw(
    tables: Sequence[Sequence[MethodRecord]], path: Path, texts: Sequence[str] = (), without: str | None = None
) -> None:
    """Plot the loss above the original's over cache bytes, with a panel for each table and text, a point for each row
    and a line through the best of each method.

    Args:
        tables: rows, the original's first.
        texts: names of the texts to show; all if empty.
        without: regular expression of methods to leave out.
    """
    shown = []
    for original, *others in tables:
        others = [r for r in others if not (without and re.fullmatch(without, r.method))]
        wanted = [i for i in range(len(original.loss)) if not texts or original.texts[i] in texts]
        shown += [Panel(original, others, i) for i in wanted]
    if not shown:
        raise MQAError(f"no results on `texts` {', '.join(texts)}")
    methods = {r.method: r.peer for panel in shown for r in panel.others}
    styles = dict(zip(methods, itertools.cycle(itertools.product("osv^D", range(10)))))
    figure, places = panels(len(shown), 5.2, 5)
    handles: dict[str, Any] = {}
    for panel, axes in zip(shown, places):
        for method in {r.method: None for r in panel.others}:
            marker, color = styles[method]
            points, style = panel.points(method), {"marker": marker, "color": f"C{color}", "ms": 4}
            best = [(x, min(y for other, y in points if other == x)) for x in dict.fromkeys(x for x, _ in points)]
            axes.plot(*zip(*points), ls="", **style)
            line = {"ls": "--", "lw": 1.0} if methods[method] else {"ls": "-", "lw": 2.0}
            (handles[method],) = axes.plot(*zip(*best), **line, **style)
        whole = axes.axvline(panel.original.cache_bytes, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        y = f"loss above the original's, nats (at least {LEAST:g})"
        describe(axes, "cache, bytes per token", y, panel.title, legend=False)
    in_order = sorted(handles, key=list(methods).index)
    lines, names = [*(handles[m] for m in in_order), whole], [*in_order, "the original's cache, 16 bits"]
    figure.legend(lines, names, **NOTE, loc="outside lower center", ncols=min(5, 3 * len(shown)))
    save(figure, path)


@dataclass(frozen=True)
class MethodPicture(Job[None]):
    """Draw the results of the comparison of methods."""

    name = "methods-picture"

    results: Annotated[Sequence[Path], Option("JSON lines, as `mqa_hf.eval.methods --output` writes them.")]
    _: KW_ONLY
    picture: Annotated[Path, Option("PNG or SVG to write.")]
    texts: Annotated[Sequence[str], Option("Texts to show. Default: all.", comma=True)] = ()
    without: Annotated[str | None, Option("Regular expression of methods to leave out.")] = None

    def resolve(self) -> "MethodPicture":
        """Return the job; raise MQAError for a picture that cannot be drawn."""
        check_new(None, self.picture)
        try:
            re.compile(self.without or "")
        except re.error as error:
            raise MQAError(f"`without` {self.without!r} is no regular expression: {error}") from error
        return self

    def run(self) -> None:
        job = self.resolve()
        draw([read(path) for path in job.results], job.picture, job.texts, job.without)

    def show(self, result: None, console: Console) -> None:
        console.print(f"wrote {self.picture}")


if __name__ == "__main__":
    run_job(MethodPicture)
