"""`mqa-hf benchmark`: how fast decoding is, through the door that people use."""

import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, function

from .plan import LatentSizes

if TYPE_CHECKING:
    from rich.console import Console

    from .benchmark_record import BenchmarkRecord

ENGINES = ("mqa-hf", "dynamic", "static")
ORIGINAL = "original"
AUTO = "auto"
LIMIT = 2**31  # of sizes
WARMUP = 8  # tokens that are written before those that are timed


class Cell(NamedTuple):
    """What is timed of a model: `batch` rows with `context` positions in the cache, or read by an encoder."""

    batch: int
    context: int
    beams: int = 1


@dataclass(frozen=True)
class Benchmark(LatentSizes, Job[list["BenchmarkRecord"]]):
    """Time decoding: the original, grouped, multi-query and with latents, this package's loop beside transformers'.

    Returns:
        A record of each cell; names of its fields say their units.

    Raises:
        MQAError: for a shape that is neither a name nor a checkpoint, and for what cannot be timed of it.
    """

    name = "benchmark"

    shapes: Annotated[Sequence[str | os.PathLike[str]], Option("Published shapes by name, directories or hub ids.")]
    _: KW_ONLY
    kv_heads: Annotated[
        Sequence[str | int], Option("Key/value heads to time; `original`: the source's own.", comma=True)
    ] = (ORIGINAL, "1")
    latents: Annotated[
        Sequence[int] | None,
        Option(
            "Numbers of a latent to time, one for all heads. Default: none; with `key_widths` or `latent_bits` those "
            "of a key and a value of one head.",
            min=1,
            comma=True,
        ),
    ] = None
    keys: Annotated[
        Sequence[str],
        Option(
            "How this package's loop has the keys of a latent: rebuilt in each step; expanded: kept beside it; auto: "
            "the faster way that fits.",
            choices=(AUTO, "rebuilt", "expanded"),
            comma=True,
        ),
    ] = (AUTO,)
    engines: Annotated[
        Sequence[str] | None,
        Option(
            "mqa-hf; dynamic and static are transformers' loops. Default: mqa-hf,dynamic; dynamic for types that run "
            "in their own class only.",
            choices=ENGINES,
            comma=True,
        ),
    ] = None
    batch: Annotated[Sequence[int], Option("Rows decoded at once.", min=1, below=LIMIT, comma=True)] = (1,)
    context: Annotated[
        Sequence[int],
        Option("Positions in the cache, or tokens of the source.", min=1, below=LIMIT, comma=True),
    ] = (512,)
    cells: Annotated[Sequence[str] | None, Option("In place of both: pairs such as 1x512,16x4096.", comma=True)] = None
    beams: Annotated[Sequence[int], Option("Beams, of encoder-decoder shapes.", min=1, below=LIMIT, comma=True)] = (1,)
    tokens: Annotated[int, Option("Tokens that are timed.", min=2, below=LIMIT)] = 48
    dtype: Annotated[str | None, Option("Default: bfloat16 on a GPU, float32 on a CPU.", choices=NUMBER_TYPES)] = None
    device: Annotated[str | None, Option("Default: cuda where there is one.")] = None
    window: Annotated[int | None, Option("Positions that self-attention sees. Default: all.", min=2, below=LIMIT)] = (
        None
    )
    largest_batch: Annotated[bool, Option("Time the largest batch that fits at each context, too.")] = False
    prefill_limit: Annotated[
        int, Option("Largest batch times context of which the first token is timed; 0: of none.", min=0)
    ] = 32768
    rounds: Annotated[int | None, Option("Turns that the models take. Default: 3 on a CPU, 1 on a GPU.", min=1)] = None
    output: Annotated[Path | str | None, Option("File that gets one JSON line per cell.")] = None
    plots: Annotated[Path | str | None, Option("Directory for pictures.")] = None

    @property
    def head_counts(self) -> list[int | None]:
        """Key/value heads to time; `None`: as many as the source has."""
        found: list[int | None] = []
        for text in map(str, self.kv_heads):
            if text != ORIGINAL and not re.fullmatch("[1-9][0-9]{0,8}", text, re.ASCII):
                raise MQAError(f"`kv_heads` takes positive whole numbers and {ORIGINAL}, got {text!r}")
            found.append(None if text == ORIGINAL else int(text))
        return list(dict.fromkeys(found))

    @property
    def asks_latents(self) -> bool:
        """Whether latents are asked for, beside those of the shapes."""
        return any(given is not None for given in (self.latents, self.key_widths, self.latent_bits))

    @property
    def workload(self) -> list[Cell]:
        """All cells."""
        pairs = [(b, n) for b in self.batch for n in self.context]
        if self.cells is not None:
            pairs = list(map(pair, self.cells))
        return [Cell(*both, beams) for both in pairs for beams in self.beams]

    @property
    def contexts(self) -> list[int]:
        return sorted({cell.context for cell in self.workload})

    def resolve(self) -> "Benchmark":
        """With device, number type and rounds; raises MQAError for what cannot be timed here."""
        import torch

        from mqa_hf.base.devices import check_device
        from mqa_hf.base.figures import can_draw
        from mqa_hf.base.shapes import unique_names

        from .benchmark_record import BenchmarkRecord

        for name in ("shapes", "kv_heads", "keys", "engines", "batch", "context", "cells", "beams"):
            if getattr(self, name) == ():
                raise MQAError(f"`{name}` is empty; there is nothing to time")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MQAError(f"`device` {device}: PyTorch sees no CUDA device; use `device` cpu")
        check_device(device)
        cpu = torch.device(device).type == "cpu"
        job = replace(
            self,
            shapes=list(dict.fromkeys(map(str, self.shapes))),
            device=device,
            dtype=self.dtype or ("float32" if cpu else "bfloat16"),
            rounds=self.rounds or (3 if cpu else 1),
        )
        unique_names([str(shape) for shape in job.shapes])  # what tables call them
        output = None if self.output is None else Path(self.output)
        if output is not None and (output.is_dir() or not output.parent.is_dir()):
            raise MQAError(f"`output` {output} cannot be written: it is a directory, or lies in none")
        if output is not None:
            BenchmarkRecord.check_appendable(output)
        if self.plots is not None and not can_draw():
            raise MQAError("`plots` needs matplotlib: pip install 'mqa-hf[benchmark]'")
        if self.plots is not None and Path(self.plots).exists() and not Path(self.plots).is_dir():
            raise MQAError(f"`plots` {self.plots} is a file; give a directory")
        return job

    def run(self) -> list["BenchmarkRecord"]:
        from .timing import measure

        return measure(self.resolve(), self.command())

    def show(self, result: list["BenchmarkRecord"], console: "Console") -> None:
        from .timing_table import timing_table

        console.width = max(console.width, 250)  # the table takes what it needs
        console.print(timing_table(result, self.window))

    def interrupted(self) -> str:
        return "" if self.output is None else f"{self.output} has a line of each cell that was timed"


def pair(text: str) -> tuple[int, int]:
    """Batch and context of a cell; raises MQAError where the text is none."""
    found = re.fullmatch("([0-9]{1,10})x([0-9]{1,10})", text, re.ASCII)
    sizes = tuple(map(int, found.groups())) if found else ()
    if len(sizes) != 2 or not all(0 < size < LIMIT for size in sizes):
        raise MQAError(f"`cells` takes pairs of batch and context such as 1x512,16x4096, got {text!r}")
    return sizes


benchmark = function(Benchmark)
