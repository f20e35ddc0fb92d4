"""`mqa-hf plan`: estimate decoding speed with fewer key/value heads or a latent, without converting anything."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from mqa_hf.base.datasheets import DEVICES
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, Options, function

if TYPE_CHECKING:
    from rich.console import Console

    from .choices import DecodingPlan

MEASURED = "measured"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}  # bytes per number


@dataclass(frozen=True)
class LatentSizes(Options):
    """Key widths and bits of the latents that are compared or timed."""

    _: KW_ONLY
    key_widths: Annotated[
        Sequence[int] | None,
        Option(
            "Key widths: components rebuilt from a latent. Default: four times a head's rotated components; a "
            "conversion chooses the width by its loss.",
            min=2,
            comma=True,
        ),
    ] = None
    latent_bits: Annotated[
        Sequence[int] | None,
        Option("Bits per stored number of a latent. Default: 16.", choices=(16, 8, 4), comma=True),
    ] = None


@dataclass(frozen=True)
class Planning(LatentSizes, Job["DecodingPlan"]):
    """Estimate decoding speed with fewer key/value heads or a latent, without converting anything.

    Returns:
        `device`; `choices`: the original, then every number of heads at every width, then every latent, each with the
        bytes, operations and minimum time of a decode step (field names carry their units); `notes`: the speed to
        expect of the latents.

    Raises:
        MQAError: if the shape is neither a known name nor a checkpoint, or does not allow a choice.
    """

    name = "plan"

    shape: Annotated[str | os.PathLike[str], Option("Name of a published shape, a directory or a Hub id.")]
    _: KW_ONLY
    kv_heads: Annotated[
        Sequence[int] | None,
        Option(
            "Numbers of key/value heads to compare with the original's. Default: those of 1, 2, 4 and 8 that divide "
            "it; none if latents are given.",
            min=1,
            comma=True,
        ),
    ] = None
    widths: Annotated[
        Sequence[int] | None,
        Option(
            "Widths of a new head, in widths of an old one. Default: 1,2; 1 for `target` native.",
            min=1,
            comma=True,
        ),
    ] = None
    latents: Annotated[
        Sequence[int] | None,
        Option(
            "Latent widths to compare. Default: the width of one head's key and value together; none if heads are "
            "given.",
            min=1,
            comma=True,
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(
            "mqa or native, as in `convert`. Default: mqa; native for model types that keep their own class.",
            choices=("mqa", "native"),
        ),
    ] = None
    batch: Annotated[int, Option("Rows decoded at once.", min=1, below=2**31)] = 1
    context: Annotated[int, Option("Positions in the cache.", min=1, below=2**31)] = 4096
    source: Annotated[int, Option("Source tokens of encoder-decoder models.", min=0, below=2**31)] = 512
    device: Annotated[
        str,
        Option(
            "h100, a100-80gb, l4, ..., or measured: this machine's.",
            choices=(MEASURED, *DEVICES),
            metavar="NAME",
        ),
    ] = "h100"
    dtype: Annotated[str, Option("Type of weights and cache.", choices=(*NUMBER_TYPES, "float8"))] = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return ITEMSIZE[self.dtype]

    @property
    def asks_heads(self) -> bool:
        """Whether heads are requested."""
        return self.kv_heads is not None or self.widths is not None

    @property
    def asks_latents(self) -> bool:
        """Whether latents are requested."""
        return any(given is not None for given in (self.latents, self.key_widths, self.latent_bits))

    def run(self) -> "DecodingPlan":
        from .choices import make_plan

        return make_plan(self)

    def show(self, result: "DecodingPlan", console: "Console") -> None:
        """Print a table, and whether prefill and training are limited by arithmetic or memory."""
        from rich.table import Table

        device, first = result.device, result.choices[0]
        source = f", source {self.source}" if self.source and first.cross_kv_bytes_per_token else ""
        table = Table(
            title=f"{self.shape}, {self.dtype}, batch {self.batch}, context {self.context}{source}, {device.name} "
            f"({device.bandwidth / 1e12:.2f} TB/s, {device.rate / 1e12:.0f} TFLOP/s)",
            title_justify="left",
        )
        for column in (
            "key/value heads", "cache, bytes/token", "read, GB/step", "bytes/operation", "floor, ms", "cache limit",
            "tokens/s", "speed-up", "largest batch", "tokens/s there", "speed-up there",
        ):  # fmt: skip
            table.add_column(column, justify="left" if column in ("key/value heads", "cache limit") else "right")
        for r in result.choices:
            table.add_row(
                r.kv_heads, f"{r.kv_bytes_per_token:,}", f"{(r.weight_bytes + r.cache_bytes) / 1e9:.2f}",
                f"{r.bytes_per_operation:.3f}", f"{r.floor_ms:.2f}", r.cache_limit, f"{r.tokens_per_sec:,.0f}",
                f"{r.speedup:.2f}",
                f"{r.largest_batch:,}" if device.memory else "-",
                f"{r.largest_batch_tokens_per_sec:,.0f}" if r.largest_batch else "-",
                f"{r.largest_batch_speedup:.2f}" if r.largest_batch else "-",
            )  # fmt: skip
        console.width = 200  # the width of the table
        console.print(table)
        for note in result.notes:
            console.print(note, soft_wrap=True)
        console.print(
            f"Prefill and training read {first.prefill_bytes_per_operation:.4f} bytes per operation. The device does "
            f"{device.rate / device.bandwidth:.0f} operations in the time of one byte: below "
            f"{device.bandwidth / device.rate:.4f} bytes per operation arithmetic is the limit, above it memory.",
            soft_wrap=True,
        )


plan = function(Planning)
