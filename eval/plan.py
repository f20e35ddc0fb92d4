"""`mqa-hf plan`: how fast decoding can be with fewer key/value heads or a latent, before anything is converted."""

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
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}  # bytes of a number


@dataclass(frozen=True)
class LatentSizes(Options):
    """Of the latents that are compared or timed, what each is beside its numbers."""

    _: KW_ONLY
    key_widths: Annotated[
        Sequence[int] | None,
        Option(
            "Numbers of keys that are rebuilt from a latent. Default: four times those of a head that are rotated; a "
            "conversion chooses them by what they lose.",
            min=2,
            comma=True,
        ),
    ] = None
    latent_bits: Annotated[
        Sequence[int] | None,
        Option("Bits of a stored number of a latent. Default: 16.", choices=(16, 8, 4), comma=True),
    ] = None


@dataclass(frozen=True)
class Planning(LatentSizes, Job["DecodingPlan"]):
    """Say how fast decoding can be with fewer key/value heads or a latent, before anything is converted.

    Returns:
        `device`, and `choices`: the original, then every number of heads at every width and every latent, each with
        bytes, operations and the least time of a step. Names of the fields say their units. `notes`: what to expect
        of the latents.

    Raises:
        MQAError: where the shape is neither a name nor a checkpoint, or a choice cannot be made of it.
    """

    name = "plan"

    shape: Annotated[str | os.PathLike[str], Option("A published shape by name, a directory or a hub id.")]
    _: KW_ONLY
    kv_heads: Annotated[
        Sequence[int] | None,
        Option(
            "Key/value heads to compare with the original's. Default: those of 1, 2, 4 and 8 that divide them, where "
            "no latents are asked for.",
            min=1,
            comma=True,
        ),
    ] = None
    widths: Annotated[
        Sequence[int] | None,
        Option(
            "Widths of a new head in units of an old one. Default: 1,2; of native targets 1.",
            min=1,
            comma=True,
        ),
    ] = None
    latents: Annotated[
        Sequence[int] | None,
        Option(
            "Numbers of a latent to compare, one for all heads. Default: as many as a key and a value of one head "
            "have, where no heads are asked for.",
            min=1,
            comma=True,
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(
            "mqa or native, as of convert. Default: mqa; native where the type is converted in its own class only.",
            choices=("mqa", "native"),
        ),
    ] = None
    batch: Annotated[int, Option("Rows decoded at once.", min=1, below=2**31)] = 1
    context: Annotated[int, Option("Positions in the cache.", min=1, below=2**31)] = 4096
    source: Annotated[int, Option("Positions of the encoder's output, where there is one.", min=0, below=2**31)] = 512
    device: Annotated[
        str,
        Option(
            "h100, a100-80gb, l4, ..., or measured: the one that is here.",
            choices=(MEASURED, *DEVICES),
            metavar="NAME",
        ),
    ] = "h100"
    dtype: Annotated[str, Option("Of weights and cache.", choices=(*NUMBER_TYPES, "float8"))] = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def asks_heads(self) -> bool:
        """Whether heads are asked for."""
        return self.kv_heads is not None or self.widths is not None

    @property
    def asks_latents(self) -> bool:
        """Whether latents are asked for."""
        return any(given is not None for given in (self.latents, self.key_widths, self.latent_bits))

    def run(self) -> "DecodingPlan":
        from .choices import make_plan

        return make_plan(self)

    def show(self, result: "DecodingPlan", console: "Console") -> None:
        """A table, and what it means for training."""
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
        console.width = 200  # what the table takes
        console.print(table)
        for note in result.notes:
            console.print(note, soft_wrap=True)
        console.print(
            f"Reading a prompt, or training, takes {first.prefill_bytes_per_operation:.4f} bytes per operation; the "
            f"device does {device.rate / device.bandwidth:.0f} operations in the time of a byte, so below "
            f"{device.bandwidth / device.rate:.4f} arithmetic is the limit, above it memory.",
            soft_wrap=True,
        )


plan = function(Planning)
