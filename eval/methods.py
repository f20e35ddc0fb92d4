"""What each way of converting a checkpoint costs in quality, before any training:

    python -m mqa_hf.eval.methods SOURCE --calibration train.jsonl.xz --validation validation.jsonl.xz --device cuda

converts it by every method, with 1, 2 and 4 heads and fitted heads 2 and 4 times as wide, and prints the loss on the
validation texts beside the cache bytes of a token. `--sweep` varies the number of calibration tokens instead;
`--peers` also measures what people use in place of a conversion (`peers/`). `--output` gets a JSON line of each row as
it is measured, of which `methods_picture.py` draws a picture.
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from mqa_hf.base.commands import run_job
from mqa_hf.base.console import say
from mqa_hf.base.devices import check_device
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.base.text import load_tokenizer
from mqa_hf.base.tokens import calibration_tokens
from mqa_hf.configuration_checks_mqa import LATENT_BLOCK
from mqa_hf.conversion.convert import FITTED, convert
from mqa_hf.conversion.inspect import inspect
from mqa_hf.conversion.loading import load_model
from mqa_hf.conversion.source import load_config
from mqa_hf.kernel_latent_plan_mqa import latent_bytes

from .methods_picture import MethodRecord, check_new, draw
from .peers import mean_loss, notes, peers_of, swapped

SWEEP = (2048, 8192, 32_768, 131_072, 524_288)


def variants(heads: int) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the conversions of a model with that many key/value heads."""
    rows: list[tuple[str, dict[str, Any]]] = []
    fewer = [n for n in (1, 2, 4) if n < heads and heads % n == 0]
    for n in fewer:
        rows += [
            (f"{method}, {n} head(s)", {"method": method, "kv_heads": n}) for method in ("mean", "first", "random")
        ]
        rows.append((f"mean + refit, {n} head(s)", {"method": "mean", "refit": True, "kv_heads": n}))
        rows.append((f"shared, {n} head(s)", {"method": "shared", "refit": False, "kv_heads": n}))
        rows.append((f"shared + refit, {n} head(s)", {"method": "shared", "kv_heads": n}))
    for width in [n for n in (2, 4) if n < heads] + [heads]:
        rows.append((f"shared + refit, 1 head {width} wide", {"method": "shared", "head_width": width}))
        if width < heads:
            budget = {"method": "shared", "cache_budget": str(width / heads)}
            rows.append((f"shared + refit, cache of {width} heads", budget))
    return rows


def latent_variants(heads: int, head_dim: int, hidden_size: int) -> list[tuple[str, dict[str, Any]]]:
    """Same for latents: as wide as 1, 2, ... heads, and at fewer bits also wider."""
    most = min(hidden_size, 2 * heads * head_dim)
    rows: list[tuple[str, dict[str, Any]]] = []
    for bits, sizes in ((16, (1, 2, 4, 8)), (8, (2, 3, 4, 8)), (4, (2, 3, 4, 8))):
        for r in (n * head_dim for n in sizes):
            if r <= most and (bits == 16 or r % LATENT_BLOCK == 0):
                name = "latent" if bits == 16 else f"latent at {bits} bits"
                rows.append((f"{name}, {r} numbers", {"method": "latent", "latent": r, "latent_bits": bits}))
    r = min(2 * head_dim, most)
    rows.append((f"latent without training, {r} numbers", {"method": "latent", "latent": r, "fit_steps": 0}))
    share = str(r / (2 * heads * head_dim))
    rows.append((f"latent, {r} numbers on average", {"method": "latent", "cache_budget": share}))
    if 0.1 * 4 * heads * head_dim >= latent_bytes(LATENT_BLOCK, 4, torch.bfloat16):  # if the smallest latent fits
        tenth = {"method": "latent", "cache_budget": "0.1", "latent_bits": 4}
        rows.append(("latent at 4 bits, a tenth of the cache", tenth))
    return rows


@dataclass(frozen=True)
class MethodComparison(Job[list[MethodRecord]]):
    """Compare the methods of conversion on one checkpoint."""

    name = "methods"

    source: Annotated[Path, Option("Checkpoint to convert.")]
    _: KW_ONLY
    calibration: Annotated[str, Option("Text to fit heads on.")]
    validation: Annotated[Sequence[str], Option("Text to measure on; may be repeated.")]
    calibration_tokens: Annotated[int, Option("Tokens to fit on.", min=1)] = 131_072
    tokens: Annotated[int, Option("Tokens to measure on.", min=1)] = 65_536
    sequence_length: Annotated[int, Option("Tokens of a row.", min=4)] = 512
    device: Annotated[str, Option("A PyTorch device.")] = "cpu"
    sweep: Annotated[bool, Option("Vary the calibration tokens.")] = False
    only: Annotated[
        Sequence[str], Option("Of the conversions, those by these methods only: mean, shared, latent, ...", comma=True)
    ] = ()
    key_width: Annotated[int | None, Option("Rebuilt components of keys of latents. Default: as chosen.", min=2)] = (
        None
    )
    peers: Annotated[bool, Option("Also measure what people use in place of a conversion.")] = False
    output: Annotated[Path | None, Option("New file that gets a JSON line of each row.")] = None
    picture: Annotated[Path | None, Option("PNG or SVG of the losses over the cache.")] = None

    def resolve(self) -> "MethodComparison":
        """Return the job; raise MQAError for a missing device and for files that cannot be written."""
        check_device(self.device)
        if self.sweep and self.peers:
            raise MQAError("`sweep` and `peers` are two tables; ask for one of them")
        check_new(self.output, self.picture)
        return self

    def run(self) -> list[MethodRecord]:
        warnings.simplefilter("ignore", ConversionWarning)
        logging.disable_progress_bar()
        job = self.resolve()
        description = inspect(job.source)
        if not description["convertible"]:
            raise MQAError(f"{job.source} cannot be converted: {description['reason']}")
        found = []
        for record in job.rows(description):
            found.append(record)
            if job.output is not None:
                record.append(job.output)
            say(f"{record.conversion}: {', '.join(f'{loss:.3f}' for loss in record.loss)} nats")
        if job.picture is not None:
            draw([found], job.picture)
        return found

    def rows(self, description: dict[str, Any]) -> Iterator[MethodRecord]:
        """Measure the original, its conversions and the peers, one after another."""
        texts, heads = self.texts(), description["num_key_value_heads"]
        cache = description["kv_bytes_per_token"]["now"]
        yield self.record("original", cache, self.losses(self.source, texts))
        chosen = [(f"{n:,} tokens", {"method": "shared", "calibration_tokens": n}) for n in SWEEP]
        if not self.sweep:
            stack = load_config(self.source).get_text_config(decoder=True)
            chosen = [*variants(heads), *latent_variants(heads, description["head_dim"], stack.hidden_size)]
            chosen = [(name, row) for name, row in chosen if not self.only or row["method"] in self.only]
        with tempfile.TemporaryDirectory() as scratch:
            for name, options in chosen:
                yield self.measured(name, options, Path(scratch) / "converted", texts)
        if self.peers:
            yield from self.peer_rows(heads, texts)

    def record(self, conversion: str, cache_bytes: int, loss: list[float], **more: Any) -> MethodRecord:
        names = [Path(text).name.split(".")[0] for text in self.validation]
        return MethodRecord(
            conversion=conversion, cache_bytes=cache_bytes, loss=loss, source=self.source.name, texts=names, **more
        )

    def peer_rows(self, heads: int, texts: Sequence[torch.Tensor]) -> Iterator[MethodRecord]:
        """Measure the peers, on the canonical model with all its heads in float32."""
        model = convert(self.source, kv_heads=heads, dtype="float32").to(self.device)
        rows = self.tokens_of(self.calibration, self.calibration_tokens)
        start = self.start()
        for peer in peers_of(model, rows):
            taken = self.taken(start)
            with swapped(model, peer.attentions):
                losses = [mean_loss(model, text) for text in texts]
            yield self.record(peer.name, peer.cache_bytes, losses, peer=True, **taken)
            start = self.start()

    def start(self) -> float:
        """Return the time, and reset the peak of memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def taken(self, start: float) -> dict[str, float | None]:
        """Seconds and peak memory since [`start`]."""
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
        return {"seconds": round(time.perf_counter() - start, 1), "device_gib": peak}

    def texts(self) -> list[torch.Tensor]:
        """Rows of each validation text."""
        return [self.tokens_of(text, self.tokens) for text in self.validation]

    def tokens_of(self, text: str, count: int) -> torch.Tensor:
        """Rows of a text [N, sequence_length]."""
        size = load_config(self.source).get_text_config(decoder=True).vocab_size
        return calibration_tokens(load_tokenizer(self.source), text, count, self.sequence_length, size, seed=0)

    def losses(self, checkpoint: Path, texts: Sequence[torch.Tensor]) -> list[float]:
        model = load_model(checkpoint, dtype=torch.float32).to(self.device)
        return [mean_loss(model, rows) for rows in texts]

    def measured(
        self, name: str, options: dict[str, Any], output: Path, texts: Sequence[torch.Tensor]
    ) -> MethodRecord:
        """Convert with these options, and measure the losses."""
        here = {"sequence_length": self.sequence_length, "dtype": "float32", "overwrite": True}
        if options["method"] == "latent" and self.key_width:
            options = {**options, "key_width": self.key_width}
        if options["method"] in FITTED or options.get("refit"):
            text = {"calibration": self.calibration, "calibration_tokens": self.calibration_tokens}
            here |= {**text, "device": self.device}
        start = self.start()
        report = convert(self.source, output, **{**here, **options})
        taken = self.taken(start)
        return self.record(name, report.kv_bytes_per_token.after, self.losses(output, texts), **taken)

    def show(self, result: list[MethodRecord], console: Console) -> None:
        """Print a table, with the share of the gap between the mean's loss and the original's that each row closes."""
        title = f"{self.source.name}: loss in nats on {self.tokens:,} tokens, no training"
        table = Table(title=title, title_justify="left")
        texts = (Path(text).name.split(".")[0] for text in self.validation)
        for column in ("conversion", "cache, bytes per token", *texts, "gap closed"):
            table.add_column(column, justify="left" if column == "conversion" else "right")
        best = result[0].loss[0]
        worst = next((r.loss[0] for r in result if r.conversion == "mean, 1 head(s)"), None)
        for r in result:
            closed = "" if worst is None else f"{(worst - r.loss[0]) / (worst - best):.1%}"
            table.add_row(r.conversion, f"{r.cache_bytes:,}", *(f"{loss:.3f}" for loss in r.loss), closed)
        if self.peers:
            table.caption = notes([r.conversion for r in result if r.peer], self.sequence_length)
            table.caption_justify = "left"
        console.width = max(console.width, 120)  # the table takes what it needs
        console.print(table)


if __name__ == "__main__":
    run_job(MethodComparison)
