"""Benchmark of the decode attention kernel for latents alone, with its minimum time and the kernel for plain heads.

    python -m mqa_hf.eval.latent_kernels

A latent is read once, and its keys are rebuilt in the kernel. The floor is the larger of two times: the bytes at the
bandwidth of a large copy, and the operations at the rate of a large matrix product, both measured. As in `kernels.py`,
calls alternate between many caches and are replayed from a CUDA graph.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from mqa_hf.base.commands import run_job
from mqa_hf.base.datasheets import Device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole
from mqa_hf.base.options import Job, Option
from mqa_hf.configuration_checks_mqa import LATENT_BLOCK
from mqa_hf.kernel_attend_mqa import attend
from mqa_hf.kernel_latent_mqa import attend_latent, latent_angles
from mqa_hf.kernel_latent_plan_mqa import latent_bytes
from mqa_hf.kernel_launch_mqa import available
from mqa_hf.packing_mqa import pack_latent

from .kernels import replayed
from .roofline import measured_device

FREQUENCIES = 64


class LatentKernelRecord(BaseModel):
    """One layer in bfloat16: nanoseconds per cached token of the kernel, its floor, and plain heads."""

    batch: int
    context: int
    heads: int
    latent: int
    components: int
    bits: int
    kernel_us: float
    ns_per_token: float
    floor_ns: float
    floor_share: float
    bound: str
    one_head_ns: float
    all_heads_ns: float | None
    copy_bandwidth: float
    matrix_rate: float


@dataclass(frozen=True)
class Size:
    """The timed sizes: rows, positions, query heads, latent width, rebuilt components and bits."""

    batch: int
    context: int
    heads: int
    latent: int
    components: int
    bits: int

    @property
    def bytes(self) -> int:
        return self.batch * self.context * latent_bytes(self.latent, self.bits, torch.bfloat16)

    @property
    def operations(self) -> int:
        """Operations: components are rebuilt once and multiplied with each query; the latent is multiplied as value,
        and as key if nothing is rebuilt."""
        r, W, H = self.latent, self.components, self.heads
        return 2 * self.batch * self.context * (r * W + H * (W + r) + (0 if W else H * r))


def latent_seconds(size: Size) -> float:
    """Seconds of the kernel, on caches of normally distributed numbers."""
    r, W, S = size.latent, size.components, size.context
    length = torch.tensor([S], dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"capacity": S}
    if W:
        angles = torch.arange(S)[:, None] * 10000.0 ** (-torch.arange(FREQUENCIES) / FREQUENCIES)
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
        options.update(
            wide=torch.randn(size.batch, size.heads, W, device="cuda", dtype=torch.bfloat16),
            weight=(torch.randn(W, r, device="cuda") * r**-0.5).bfloat16(),
            bias=torch.randn(W, device="cuda"),
            angles=latent_angles(cos, sin, torch.bfloat16).cuda(),
            frequency=torch.randint(0, FREQUENCIES, (W // 2,), device="cuda", dtype=torch.int32).sort().values,
            positions=torch.full((size.batch,), S - 1, device="cuda"),
        )
    else:
        options["plain"] = torch.randn(size.batch, size.heads, r, device="cuda", dtype=torch.bfloat16)
    calls: list[Callable[[], object]] = []
    for _ in range(max(2, min(32, int(4e8 // size.bytes)))):
        latents = torch.randn(size.batch, S, r, device="cuda", dtype=torch.bfloat16)
        packed: dict[str, Any] = {}
        if size.bits < 16:
            latents, packed["scales"], packed["offsets"] = pack_latent(latents, size.bits)
        calls.append(partial(attend_latent, latents, length, r**-0.5, **options, **packed))
    return replayed(calls)


def heads_seconds(size: Size, kv_heads: int, width: int) -> float:
    """Seconds of the kernel for plain heads."""
    query = torch.randn(size.batch, size.heads, width, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor([size.context], dtype=torch.int32, device="cuda")
    shape, copies = (size.batch, kv_heads, size.context, width), 2 if kv_heads > 1 else 8
    caches = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(copies)]
    step = partial(attend, query, length=length, scale=width**-0.5, capacity=size.context)
    return replayed([partial(step, keys=k, values=v) for k, v in caches])


@dataclass(frozen=True)
class LatentKernelTiming(Job[list[LatentKernelRecord]]):
    """Time the attention kernel for latents over widths and rebuilt components."""

    name = "latent-kernels"

    _: KW_ONLY
    batch: Annotated[Sequence[int], Option("Rows.", min=1, comma=True)] = (1, 64)
    context: Annotated[Sequence[int], Option("Positions in use.", min=1, comma=True)] = (4096,)
    latent: Annotated[Sequence[int], Option("Widths of the latent.", min=1, comma=True)] = (256, 128)
    components: Annotated[Sequence[int], Option("Rebuilt components.", min=0, comma=True)] = (0, 512, 1024, 2048)
    bits: Annotated[Sequence[int], Option("Bits per number.", choices=(16, 8, 4), comma=True)] = (16,)
    heads: Annotated[int, Option("Query heads.", min=1)] = 32
    width: Annotated[int, Option("Width of the plain heads to compare with.", min=1)] = 128
    largest: Annotated[float, Option("Skip plain heads that read more gigabytes than this.", above=0)] = 10.0
    output: Annotated[Path | None, Option("File for JSON lines.")] = None

    @property
    def sizes(self) -> list[Size]:
        every = itertools.product(self.batch, self.context, self.latent, self.components, self.bits)
        return [Size(b, n, self.heads, r, W, bits) for b, n, r, W, bits in every]

    def resolve(self) -> "LatentKernelTiming":
        """Return the job; raise MQAError if the kernel cannot run."""
        if odd := [W for W in self.components if W % 2]:
            raise MQAError(f"`components` must be even, got {odd[0]}")
        if min(self.bits) < 16 and (uneven := [r for r in self.latent if r % LATENT_BLOCK]):
            raise MQAError(f"`latent` must be a multiple of {LATENT_BLOCK} for 8 and 4 `bits`, got {uneven[0]}")
        if not torch.cuda.is_available() or not available(torch.device("cuda")):
            raise MQAError("the kernel needs a CUDA device of compute capability 8.0 or higher, and Triton")
        return self

    def run(self) -> list[LatentKernelRecord]:
        job = self.resolve()
        device, plain, found = measured_device(), {}, []
        for size in job.sizes:
            key = size.batch, size.context
            if key not in plain:
                room = 4e-9 * size.batch * size.context * size.heads * job.width <= job.largest
                every = heads_seconds(size, size.heads, job.width) if room else None
                plain[key] = heads_seconds(size, 1, job.width), every
            found.append(record(size, latent_seconds(size), plain[key], device))
        if job.output is not None:
            write_whole(job.output, "".join(each.model_dump_json() + "\n" for each in found))
        return found

    def show(self, result: list[LatentKernelRecord], console: Console) -> None:
        first = result[0]
        device = (
            f"{torch.cuda.get_device_name()}, copy {first.copy_bandwidth / 1e12:.2f} TB/s, "
            f"products {first.matrix_rate / 1e12:.0f} TFLOP/s"
        )
        title = f"attention to latents, bfloat16, {self.heads} query heads, nanoseconds a token, {device}"
        table = Table(title=title, title_justify="left")
        for column in (
            "latent", "components", "bits", "batch", "context", "kernel", "floor", "floor / kernel", "bound by",
            "1 head", f"{self.heads} heads",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for r in result:
            table.add_row(
                f"{r.latent}", f"{r.components}", f"{r.bits}", f"{r.batch}", f"{r.context}", f"{r.ns_per_token:.3f}",
                f"{r.floor_ns:.3f}", f"{100 * r.floor_share:.0f}%", r.bound, f"{r.one_head_ns:.3f}",
                "" if r.all_heads_ns is None else f"{r.all_heads_ns:.3f}",
            )  # fmt: skip
        console.print(table)


def record(
    size: Size, seconds: float, plain: tuple[float, float | None], device: Device
) -> LatentKernelRecord:  # fmt: skip
    """Make the record from the seconds of the kernel, and of plain heads, one and all."""
    tokens = size.batch * size.context
    reading, computing = size.bytes / device.bandwidth, size.operations / device.rate
    floor = max(reading, computing)
    one, every = plain
    return LatentKernelRecord(
        **asdict(size),
        kernel_us=1e6 * seconds,
        ns_per_token=1e9 * seconds / tokens,
        floor_ns=1e9 * floor / tokens,
        floor_share=floor / seconds,
        bound="bytes" if reading > computing else "operations",
        one_head_ns=1e9 * one / tokens,
        all_heads_ns=None if every is None else 1e9 * every / tokens,
        copy_bandwidth=device.bandwidth,
        matrix_rate=device.rate,
    )


if __name__ == "__main__":
    run_job(LatentKernelTiming)
