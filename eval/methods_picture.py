"""What `methods.py` has measured: a record for each row of its table, and a picture of all of them:

python -m mqa_hf.eval.methods_picture results.jsonl methods.png
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from mqa_hf.base.commands import run_job
from mqa_hf.base.errors import MQAError
from mqa_hf.base.figures import NOTE, can_draw, describe, panels, save
from mqa_hf.base.options import Job, Option
from mqa_hf.base.records import Record

LEAST = 1e-3  # nats, below which differences are drawn as if they were that


class MethodRecord(Record):
    """A conversion or a peer, the cache bytes of a token, what it took, and the loss on each validation text.

    Attributes:
        conversion: "METHOD, setting"; of the first row "original".
        peer: whether it is no conversion of this package.
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

    def append(self, path: Path) -> None:
        """Add it to a file; raises MQAError where that cannot be written."""
        try:
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False) + "\n")
        except OSError as error:
            raise MQAError(f"{path} cannot be written: {error}") from error


def read(path: Path) -> list[MethodRecord]:
    """The records of a file.

    Raises:
        MQAError: where a line is none, or the first is not the original's.
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
    """Raises MQAError where results or a picture could not be written."""
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise MQAError(f"`output` {output} must be a new file in a directory that is there")
    if picture is not None and not can_draw():
        raise MQAError("`picture` needs matplotlib: pip install 'mqa-hf[benchmark]'")
    if picture is not None and picture.suffix.lower() not in (".png", ".svg"):
        raise MQAError(f"`picture` {picture} must end in .png or .svg")


def draw(records: Sequence[MethodRecord], path: Path) -> None:
    """Loss above the original's over the cache, a panel for each text: points, and a line through the best of each
    method."""
    original, others = records[0], [r for r in records if r.conversion != "original"]
    methods = list(dict.fromkeys(r.method for r in others))
    figure, places = panels(len(original.loss), 5.2, 5)
    handles: dict[str, Any] = {}
    for n, axes in enumerate(places):
        styles = itertools.cycle(itertools.product("osv^D", range(10)))
        for method, (marker, color) in zip(methods, styles):
            these = [r for r in others if r.method == method]
            points = sorted((r.cache_bytes, max(r.loss[n] - original.loss[n], LEAST)) for r in these)
            best = [(x, min(y for other, y in points if other == x)) for x in dict.fromkeys(x for x, _ in points)]
            style = {"marker": marker, "color": f"C{color}", "ms": 4}
            axes.plot(*zip(*points), ls="", **style)
            line = {"ls": "--", "lw": 1.0} if these[0].peer else {"ls": "-", "lw": 2.0}
            (handles[method],) = axes.plot(*zip(*best), **line, **style)
        axes.axvline(original.cache_bytes, color="black", lw=0.6)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        name = original.texts[n] if original.texts else ""
        title, y = f"{original.source}, {name}: {original.loss[n]:.3f} nats", "loss above the original's, nats"
        describe(axes, "cache, bytes per token", f"{y} (at least {LEAST:g})", title, legend=False)
    figure.legend(handles.values(), handles, **NOTE, loc="outside lower center", ncols=5)
    save(figure, path)


@dataclass(frozen=True)
class MethodPicture(Job[None]):
    """Draw what the comparison of methods has measured."""

    name = "methods-picture"

    results: Annotated[Path, Option("JSON lines, as `mqa_hf.eval.methods --output` writes them.")]
    picture: Annotated[Path, Option("PNG or SVG to write.")]

    def resolve(self) -> "MethodPicture":
        check_new(None, self.picture)
        return self

    def run(self) -> None:
        draw(read(self.results), self.resolve().picture)

    def show(self, result: None, console: Console) -> None:
        console.print(f"{self.picture} is drawn")


if __name__ == "__main__":
    run_job(MethodPicture)
