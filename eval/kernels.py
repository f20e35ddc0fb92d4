"""Benchmark of the decode attention kernel alone, with the device's copy bandwidth and PyTorch's attention.

    python -m mqa_hf.eval.kernels

Bandwidth counts only keys and values, read once. Calls alternate between many caches, so that none is found in the L2
cache, and are replayed from a CUDA graph, as in decoding.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from mqa_hf.base.commands import run_job
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole
from mqa_hf.base.options import Job, Option
from mqa_hf.kernel_attend_mqa import attend
from mqa_hf.kernel_launch_mqa import available

from .roofline import measured_device


class KernelRecord(BaseModel):
    """One layer in bfloat16: bytes read, and the times of the kernel and of PyTorch's attention."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    width: int
    read_bytes: int
    kernel_us: float
    kernel_bandwidth_share: float
    copy_bandwidth: float
    sdpa_us: float
    sdpa_over_kernel: float


def replayed(calls: list[Callable[[], object]], times: int = 15) -> float:
    """Median seconds of a call, over replays of one graph with all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(times + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / len(calls))
    return sorted(seconds[3:])[times // 2]


def measure(batch: int, context: int, heads: int, kv_heads: int, width: int, bandwidth: float) -> KernelRecord:
    """Seconds and bytes per second of the kernel and of PyTorch's attention, for one layer in bfloat16."""
    size = 2 * batch * kv_heads * context * width * 2
    copies = max(2, min(32, int(4e8 // size)))
    query = torch.randn(batch, heads, width, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([context], dtype=torch.int32, device="cuda")
    shape = (batch, kv_heads, context, width)
    caches = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(copies)]
    scale = width**-0.5
    sdpa, one = (
        partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=True),
        query[:, :, None],
    )
    counters = torch.zeros(batch * heads, dtype=torch.int32, device="cuda")
    step = partial(attend, query, length=length, scale=scale, capacity=context, counters=counters)
    ours = replayed([partial(step, keys=k, values=v) for k, v in caches])
    theirs = replayed([partial(sdpa, one, k, v) for k, v in caches])
    return KernelRecord(
        batch=batch,
        context=context,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        read_bytes=size,
        kernel_us=1e6 * ours,
        kernel_bandwidth_share=size / ours / bandwidth,
        copy_bandwidth=bandwidth,
        sdpa_us=1e6 * theirs,
        sdpa_over_kernel=theirs / ours,
    )


@dataclass(frozen=True)
class KernelTiming(Job[list[KernelRecord]]):
    """Time the attention kernel over batch and context."""

    name = "kernels"

    _: KW_ONLY
    batch: Annotated[Sequence[int], Option("Rows.", min=1, comma=True)] = (1, 4, 16, 64, 256)
    context: Annotated[Sequence[int], Option("Positions in use.", min=1, comma=True)] = (512, 2048, 8192, 32768)
    heads: Annotated[int, Option("Query heads.", min=1)] = 32
    kv_heads: Annotated[Sequence[int], Option("Key/value heads.", min=1, comma=True)] = (1, 8)
    width: Annotated[int, Option("Width of a head.", min=1)] = 128
    largest: Annotated[float, Option("Skip cells that read more gigabytes than this.", above=0)] = 10.0
    output: Annotated[Path | None, Option("File for JSON lines.")] = None

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Key/value heads, rows and positions to time."""
        every = itertools.product(self.kv_heads, self.batch, self.context)
        return [(g, b, n) for g, b, n in every if 4e-9 * g * b * n * self.width <= self.largest]

    def resolve(self) -> "KernelTiming":
        """Return the job; raise MQAError if the kernel cannot run."""
        uneven = [n for n in self.kv_heads if self.heads % n]
        if uneven:
            raise MQAError(f"`kv_heads` {uneven[0]} must divide the {self.heads} query `heads`")
        if not torch.cuda.is_available() or not available(torch.device("cuda")):
            raise MQAError("the kernel needs a CUDA device of compute capability 8.0 or higher, and Triton")
        if not self.sizes:
            raise MQAError(f"every cell reads more than `largest` {self.largest:g} gigabytes; raise it")
        return self

    def run(self) -> list[KernelRecord]:
        job = self.resolve()
        bandwidth = measured_device().bandwidth
        found = [measure(rows, n, job.heads, group, job.width, bandwidth) for group, rows, n in job.sizes]
        if job.output is not None:
            write_whole(job.output, "".join(record.model_dump_json() + "\n" for record in found))
        return found

    def show(self, result: list[KernelRecord], console: Console) -> None:
        device = f"{torch.cuda.get_device_name()}, copy {result[0].copy_bandwidth / 1e12:.2f} TB/s"
        title = f"attention of one query per row, bfloat16, {self.heads} heads of {self.width}, {device}"
        table = Table(title=title, title_justify="left")
        for column in (
            "K/V heads", "batch", "context", "read, MB", "kernel, us", "of copy", "sdpa, us", "sdpa / kernel",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for r in result:
            table.add_row(
                f"{r.kv_heads}", f"{r.batch}", f"{r.context}", f"{r.read_bytes / 1e6:.1f}", f"{r.kernel_us:.1f}",
                f"{100 * r.kernel_bandwidth_share:.0f}%", f"{r.sdpa_us:.1f}", f"{r.sdpa_over_kernel:.2f}",
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    run_job(KernelTiming)
