"""`mqa-hf benchmark`: measure decoding speed through `generate()`."""

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
LIMIT = 2**31  # sizes must be below
WARMUP = 8  # tokens generated before the timed ones


class Cell(NamedTuple):
    """One timed workload: `batch` rows with `context` positions in the cache or as the encoder's input."""

    batch: int
    context: int
    beams: int = 1


@dataclass(frozen=True)
class Benchmark(LatentSizes, Job[list["BenchmarkRecord"]]):
    """Time decoding with the original's heads, fewer heads or latents, in this package's loop and in transformers'.

    Returns:
        One record per cell; field names carry their units.

    Raises:
        MQAError: if a shape is neither a known name nor a checkpoint, or cannot be timed as asked.
    """

    name = "benchmark"

    shapes: Annotated[Sequence[str | os.PathLike[str]], Option("Names of published shapes, directories or Hub ids.")]
    _: KW_ONLY
    kv_heads: Annotated[
        Sequence[str | int], Option("Numbers of key/value heads to time; `original` is the source's.", comma=True)
    ] = (ORIGINAL, "1")
    latents: Annotated[
        Sequence[int] | None,
        Option(
            "Latent widths to time. Default: no latents; with `key_widths` or `latent_bits`, the width of one head's "
            "key and value together.",
            min=1,
            comma=True,
        ),
    ] = None
    keys: Annotated[
        Sequence[str],
        Option(
            "Keys of latents in this package's loop: rebuilt at each step, expanded (cached beside the latents), or "
            "auto (the faster by estimate that fits in memory).",
            choices=(AUTO, "rebuilt", "expanded"),
            comma=True,
        ),
    ] = (AUTO,)
    engines: Annotated[
        Sequence[str] | None,
        Option(
            "mqa-hf, or transformers' loop with a dynamic or static cache. Default: mqa-hf,dynamic; dynamic alone for "
            "model types that run only in their own class.",
            choices=ENGINES,
            comma=True,
        ),
    ] = None
    batch: Annotated[Sequence[int], Option("Rows decoded at once.", min=1, below=LIMIT, comma=True)] = (1,)
    context: Annotated[
        Sequence[int],
        Option("Positions in the cache, or source tokens.", min=1, below=LIMIT, comma=True),
    ] = (512,)
    cells: Annotated[Sequence[str] | None, Option("Pairs instead of both, such as 1x512,16x4096.", comma=True)] = None
    beams: Annotated[Sequence[int], Option("Beams (encoder-decoder).", min=1, below=LIMIT, comma=True)] = (1,)
    tokens: Annotated[int, Option("Tokens to time.", min=2, below=LIMIT)] = 48
    dtype: Annotated[str | None, Option("Default: bfloat16 on a GPU, float32 on a CPU.", choices=NUMBER_TYPES)] = None
    device: Annotated[str | None, Option("Default: cuda if available, else cpu.")] = None
    window: Annotated[
        int | None, Option("Sliding window of self-attention, in positions. Default: none.", min=2, below=LIMIT)
    ] = None
    largest_batch: Annotated[bool, Option("Also time the largest batch that fits at each context.")] = False
    prefill_limit: Annotated[
        int, Option("Time the prefill up to this product of batch and context; 0: never.", min=0)
    ] = 32768
    rounds: Annotated[int | None, Option("Rounds over all models. Default: 3 on a CPU, 1 on a GPU.", min=1)] = None
    output: Annotated[Path | str | None, Option("File to append one JSON line per cell to.")] = None
    plots: Annotated[Path | str | None, Option("Directory for plots.")] = None

    @property
    def head_counts(self) -> list[int | None]:
        """Numbers of key/value heads to time; `None` is the source's."""
        found: list[int | None] = []
        for text in map(str, self.kv_heads):
            if text != ORIGINAL and not re.fullmatch("[1-9][0-9]{0,8}", text, re.ASCII):
                raise MQAError(f"`kv_heads` takes positive whole numbers or {ORIGINAL}, got {text!r}")
            found.append(None if text == ORIGINAL else int(text))
        return list(dict.fromkeys(found))

    @property
    def asks_latents(self) -> bool:
        """Whether latents are requested besides those of the shapes."""
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
        """Fill in device, number type and rounds; raise MQAError for what cannot be timed here."""
        import torch

        from mqa_hf.base.devices import check_device
        from mqa_hf.base.figures import can_draw
        from mqa_hf.base.shapes import unique_names

        from .benchmark_record import BenchmarkRecord
        from .divided import device_of_rank, ranks_of_job

        for name in ("shapes", "kv_heads", "keys", "engines", "batch", "context", "cells", "beams"):
            if getattr(self, name) == ():
                raise MQAError(f"`{name}` is empty; give at least one value")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MQAError(f"`device` {device}: PyTorch sees no CUDA device; use `device` cpu")
        device = device_of_rank(device)
        check_device(device)
        if ranks_of_job() > 1 and self.largest_batch:
            raise MQAError("`largest_batch` is found by one process; leave it out with several")
        cpu = torch.device(device).type == "cpu"
        job = replace(
            self,
            shapes=list(dict.fromkeys(map(str, self.shapes))),
            device=device,
            dtype=self.dtype or ("float32" if cpu else "bfloat16"),
            rounds=self.rounds or (3 if cpu else 1),
        )
        unique_names([str(shape) for shape in job.shapes])  # the names in tables
        output = None if self.output is None else Path(self.output)
        if output is not None and (output.is_dir() or not output.parent.is_dir()):
            raise MQAError(f"`output` {output} must be a file in an existing directory")
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

        console.width = max(console.width, 250)  # wide enough for the table
        console.print(timing_table(result, self.window))

    def interrupted(self) -> str:
        return "" if self.output is None else f"{self.output} has one line for each cell timed so far"


def pair(text: str) -> tuple[int, int]:
    """Parse batch and context, such as 1x512; raise MQAError for anything else."""
    found = re.fullmatch("([0-9]{1,10})x([0-9]{1,10})", text, re.ASCII)
    sizes = tuple(map(int, found.groups())) if found else ()
    if len(sizes) != 2 or not all(0 < size < LIMIT for size in sizes):
        raise MQAError(f"`cells` takes pairs of batch and context such as 1x512,16x4096, got {text!r}")
    return sizes


benchmark = function(Benchmark)
