"""What each way of converting a checkpoint costs in quality, before any training:

    python -m mqa_hf.eval.methods SOURCE --calibration train.jsonl.xz --validation validation.jsonl.xz --device cuda

converts it by every method, with 1, 2 and 4 heads and fitted heads 2 and 4 times as wide, and prints the loss on the
validation texts beside the cache bytes of a token. `--sweep` varies the number of calibration tokens instead.
"""

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

from mqa_hf.base.commands import run_job
from mqa_hf.base.console import say
from mqa_hf.base.devices import check_device
from mqa_hf.base.errors import ConversionWarning, MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.base.text import calibration_tokens, load_tokenizer
from mqa_hf.conversion.convert import convert
from mqa_hf.conversion.inspect import inspect
from mqa_hf.conversion.loading import load_model
from mqa_hf.conversion.source import load_config

SWEEP = (2048, 8192, 32_768, 131_072, 524_288)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, batch: int = 4) -> float:
    """Mean cross-entropy in nats of each token after the first of its row; tokens [N, T]."""
    total = 0.0
    for rows in tokens.split(batch):
        logits = model(rows.to(model.device), use_cache=False).logits[:, :-1].float()
        labels = rows[:, 1:].to(model.device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


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


class MethodRecord(BaseModel):
    """A conversion, the cache bytes of a token at 16 bits, what it took, and the loss on each validation text."""

    conversion: str
    cache_bytes: int
    seconds: float | None = None
    device_gib: float | None = None
    loss: list[float]


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

    def resolve(self) -> "MethodComparison":
        """Itself; raises MQAError for a device that is not there."""
        check_device(self.device)
        return self

    def run(self) -> list[MethodRecord]:
        warnings.simplefilter("ignore", ConversionWarning)
        logging.disable_progress_bar()
        job = self.resolve()
        description = inspect(job.source)
        if not description["convertible"]:
            raise MQAError(f"{job.source} cannot be converted: {description['reason']}")
        texts = job.texts()
        cache = description["kv_bytes_per_token"]["now"]
        found = [MethodRecord(conversion="original", cache_bytes=cache, loss=job.losses(job.source, texts))]
        chosen = [(f"{n:,} tokens", {"method": "shared", "calibration_tokens": n}) for n in SWEEP]
        if not job.sweep:
            chosen = variants(description["num_key_value_heads"])
        with tempfile.TemporaryDirectory() as scratch:
            for name, options in chosen:
                found.append(job.measured(name, options, Path(scratch) / "converted", texts))
                say(f"{name}: {', '.join(f'{loss:.3f}' for loss in found[-1].loss)} nats")
        return found

    def texts(self) -> list[torch.Tensor]:
        """Rows of each validation text."""
        size, length = load_config(self.source).get_text_config(decoder=True).vocab_size, self.sequence_length
        tokenizer = load_tokenizer(self.source)
        return [calibration_tokens(tokenizer, text, self.tokens, length, size, seed=0) for text in self.validation]

    def losses(self, checkpoint: Path, texts: Sequence[torch.Tensor]) -> list[float]:
        model = load_model(checkpoint, dtype=torch.float32).to(self.device)
        return [mean_loss(model, rows) for rows in texts]

    def measured(
        self, name: str, options: dict[str, Any], output: Path, texts: Sequence[torch.Tensor]
    ) -> MethodRecord:
        """A conversion with these options, and its losses."""
        here = {"sequence_length": self.sequence_length, "dtype": "float32", "overwrite": True}
        if options["method"] == "shared" or options.get("refit"):
            text = {"calibration": self.calibration, "calibration_tokens": self.calibration_tokens}
            here |= {**text, "device": self.device}
        start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        report = convert(self.source, output, **{**here, **options})
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
        return MethodRecord(
            conversion=name,
            cache_bytes=report.kv_bytes_per_token.after,
            seconds=round(time.perf_counter() - start, 1),
            device_gib=peak,
            loss=self.losses(output, texts),
        )

    def show(self, result: list[MethodRecord], console: Console) -> None:
        """A table; how much of the gap between the mean's loss and the original's each closes."""
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
        console.print(table)


if __name__ == "__main__":
    run_job(MethodComparison)
