"""The decoding attention kernel on its own, beside the copy bandwidth of the device and PyTorch's attention.

    python -m mqa_hf.eval.kernels

Keys and values are read once; nothing else counts. Many caches take turns, so that none is found in the device's own
cache, and calls are replayed from a CUDA graph, as in decoding.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from mqa_hf.base.entry import run_command
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import numbers
from mqa_hf.kernel_attend_mqa import attend
from mqa_hf.kernel_launch_mqa import available

from .roofline import measured_device


def replayed(calls: list[Callable[[], object]], times: int = 15) -> float:
    """Median seconds of a call, over replays of one graph of them all."""
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


def measure(batch: int, context: int, heads: int, kv_heads: int, width: int, bandwidth: float) -> dict:
    """Seconds and bytes per second of the kernel and of PyTorch's attention, for one layer of bfloat16."""
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
    return {
        "batch": batch,
        "context": context,
        "heads": heads,
        "kv_heads": kv_heads,
        "width": width,
        "read_bytes": size,
        "kernel_us": 1e6 * ours,
        "kernel_bandwidth_share": size / ours / bandwidth,
        "sdpa_us": 1e6 * theirs,
        "sdpa_over_kernel": theirs / ours,
    }


def main(
    batch: Annotated[str, typer.Option(help="Rows.")] = "1,4,16,64,256",
    context: Annotated[str, typer.Option(help="Positions in use.")] = "512,2048,8192,32768",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[str, typer.Option(help="Key/value heads.")] = "1,8",
    width: Annotated[int, typer.Option(help="Width of a head.")] = 128,
    largest: Annotated[float, typer.Option(help="Skip what reads more gigabytes than this.")] = 10,
    output: Annotated[Path | None, typer.Option(help="File for JSON lines.")] = None,
) -> None:
    """Time the attention kernel over batch and context."""
    if not torch.cuda.is_available() or not available(torch.device("cuda")):
        raise MQAError("the kernel needs a CUDA device of compute capability 8.0 or more, and Triton")
    device = measured_device()
    title = f"attention of one query per row, bfloat16, {heads} heads of {width}, {device.name}, copy "
    table = Table(title=title + f"{device.bandwidth / 1e12:.2f} TB/s", title_justify="left")
    for column in ("K/V heads", "batch", "context", "read, MB", "kernel, us", "of copy", "sdpa, us", "sdpa / kernel"):
        table.add_column(column, justify="right")
    records = []
    for group in numbers("--kv-heads", kv_heads):
        for rows in numbers("--batch", batch):
            for positions in numbers("--context", context):
                if 4e-9 * rows * group * positions * width > largest:
                    continue
                r = measure(rows, positions, heads, group, width, device.bandwidth)
                records.append(r)
                table.add_row(
                    f"{group}", f"{rows}", f"{positions}", f"{r['read_bytes'] / 1e6:.1f}", f"{r['kernel_us']:.1f}",
                    f"{100 * r['kernel_bandwidth_share']:.0f}%", f"{r['sdpa_us']:.1f}", f"{r['sdpa_over_kernel']:.2f}",
                )  # fmt: skip
    Console(width=120).print(table)
    if output is not None:
        output.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
