"""Benchmark of the chosen experts of one layer in a decode step, with transformers' products and the minimum time.

    python -m mqa_hf.eval.expert_kernels

The minimum is that of reading the chosen experts once, or of computing with them. Calls alternate between copies of
the weights and are replayed from a CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch import nn

from mqa_hf.base.commands import run_job
from mqa_hf.base.datasheets import Device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole
from mqa_hf.base.options import Job, Option
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.experts_mqa import MQAExperts
from mqa_hf.kernel_experts_mqa import MAX_PAIRS, chosen_experts
from mqa_hf.kernel_launch_mqa import available

from .kernels import replayed
from .roofline import measured_device
from .shapes import OwnShape, read_shape

FEW_ROWS = 16  # most rows for which transformers' batched products, which copy weights per row, are timed


class ExpertRecord(BaseModel):
    """One layer's experts in bfloat16; microseconds. `batched_us`: only for few rows."""

    shape: str
    rows: int
    experts_read: int
    floor_us: float
    kernel_us: float
    grouped_us: float
    batched_us: float | None


def measure(shape: str, config: MQAConfig, rows: int, device: Device) -> ExpertRecord:
    """Time the experts of a layer of this shape for rows that choose at random."""
    E, k, d, f = config.num_experts, config.num_experts_per_tok, config.hidden_size, config.expert_intermediate_size
    assert E is not None
    assert f is not None
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    with torch.device("meta"):
        copies = [MQAExperts(config) for _ in range(max(1, min(4, int(8e9 // (6 * E * d * f)))))]
    for experts in copies:
        experts.has_bias = config.expert_bias
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(torch.randn(weight.shape, **options) * 0.02, requires_grad=False))
    x, weights = torch.randn(rows, d, **options), torch.rand(rows, k, **options)
    chosen = torch.rand(rows, E, device="cuda").argsort(-1)[:, :k].contiguous()
    read = chosen.unique().numel()
    floor = max(6 * read * d * f / device.bandwidth, 6 * rows * k * d * f / device.rate)
    ours: list[Callable[[], object]] = [
        partial(
            chosen_experts,
            x,
            m.gate_up_proj,
            m.down_proj,
            chosen,
            weights,
            config.hidden_act,
            gate_up_bias=m.gate_up_proj_bias,
            down_bias=m.down_proj_bias,
            limit=m.limit,
        )
        for m in copies
    ]
    theirs = {}
    for implementation in ("grouped_mm", "batched_mm"):
        config._experts_implementation = implementation
        if implementation == "grouped_mm" or rows <= FEW_ROWS:
            theirs[implementation] = 1e6 * replayed([partial(m, x, chosen, weights) for m in copies])
    return ExpertRecord(
        shape=shape,
        rows=rows,
        experts_read=read,
        floor_us=1e6 * floor,
        kernel_us=1e6 * replayed(ours),
        grouped_us=theirs["grouped_mm"],
        batched_us=theirs.get("batched_mm"),
    )


@dataclass(frozen=True)
class ExpertTiming(Job[list[ExpertRecord]]):
    """Time the experts of a layer over rows."""

    name = "expert-kernels"

    _: KW_ONLY
    shapes: Annotated[Sequence[str], Option("Names of published shapes, directories or Hub ids.", comma=True)] = (
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "gpt-oss-20b",
    )
    batch: Annotated[Sequence[int], Option("Rows.", min=1, comma=True)] = (1, 16, 64, 256)
    output: Annotated[Path | None, Option("File for JSON lines.")] = None

    def configs(self) -> dict[str, MQAConfig]:
        """The configurations; raises MQAError if one has no experts or a batch is too large."""
        found = {}
        for shape in self.shapes:
            _, config = read_shape(shape)
            if isinstance(config, OwnShape) or not decoder_of(config).num_experts:
                raise MQAError(f"{shape} has no experts in this package's class")
            found[shape] = decoder_of(config)
            most = MAX_PAIRS // found[shape].num_experts_per_tok
            if max(self.batch) > most:
                raise MQAError(f"`batch` {max(self.batch)} is more than the kernel's {most} rows for {shape}")
        return found

    def run(self) -> list[ExpertRecord]:
        configs = self.configs()
        if not torch.cuda.is_available() or not available(torch.device("cuda")):
            raise MQAError("the kernel needs a CUDA device of compute capability 8.0 or higher, and Triton")
        device = measured_device()
        found = [measure(shape, config, rows, device) for shape, config in configs.items() for rows in self.batch]
        if self.output is not None:
            write_whole(self.output, "".join(record.model_dump_json() + "\n" for record in found))
        return found

    def show(self, result: list[ExpertRecord], console: Console) -> None:
        title = f"experts of one layer, bfloat16, {torch.cuda.get_device_name()}, microseconds"
        table = Table(title=title, title_justify="left")
        for column in ("shape", "rows", "experts read", "floor", "kernel", "grouped", "batched"):
            table.add_column(column, justify="left" if column == "shape" else "right")
        for r in result:
            batched = "-" if r.batched_us is None else f"{r.batched_us:.0f}"
            numbers = (f"{r.floor_us:.0f}", f"{r.kernel_us:.0f}", f"{r.grouped_us:.0f}", batched)
            table.add_row(r.shape, f"{r.rows}", f"{r.experts_read}", *numbers)
        console.print(table)


if __name__ == "__main__":
    run_job(ExpertTiming)
