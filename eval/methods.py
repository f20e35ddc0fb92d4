"""What each way of converting a checkpoint costs in quality, before any training:

    python -m mqa_hf.eval.methods SOURCE --calibration train.jsonl.xz --validation validation.jsonl.xz --device cuda

converts it by every method, with 1, 2 and 4 heads and fitted heads 2 and 4 times as wide, and prints the loss on the
validation texts beside the cache bytes of a token. `--sweep` varies the number of calibration tokens instead. Each
line is also printed as JSON.
"""

import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

from mqa_hf import convert, inspect
from mqa_hf.base.entry import run_command
from mqa_hf.base.errors import ConversionWarning
from mqa_hf.base.text import calibration_tokens, load_tokenizer
from mqa_hf.conversion.loading import load_model

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


def main(
    source: Annotated[Path, typer.Argument(help="Checkpoint to convert.")],
    calibration: Annotated[str, typer.Option(help="Text to fit heads on.")],
    validation: Annotated[list[str], typer.Option(help="Text to measure on; may be repeated.")],
    calibration_tokens_: Annotated[int, typer.Option("--calibration-tokens", help="Tokens to fit on.")] = 131_072,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 65_536,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    device: Annotated[str, typer.Option(help="A PyTorch device.")] = "cpu",
    sweep: Annotated[bool, typer.Option("--sweep", help="Vary the calibration tokens.")] = False,
) -> None:
    """Compare the methods of conversion on one checkpoint."""
    warnings.simplefilter("ignore", ConversionWarning)
    logging.disable_progress_bar()
    console = Console(width=120, markup=False)
    ids: list[torch.Tensor] = []

    def losses(directory: Path) -> list[float]:
        model = load_model(directory, dtype=torch.float32).to(device)
        if not ids:
            size = model.config.vocab_size
            ids.extend(
                calibration_tokens(load_tokenizer(source), text, tokens, sequence_length, size, seed=0)
                for text in validation
            )
        return [mean_loss(model, rows) for rows in ids]

    description = inspect(source)
    original = losses(source)
    results = [{"conversion": "original", "cache_bytes": description["kv_bytes_per_token"]["now"], "loss": original}]
    if sweep:
        chosen = [(f"{n:,} tokens", {"method": "shared", "calibration_tokens": n}) for n in SWEEP]
    else:
        chosen = variants(description["num_key_value_heads"])
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in chosen:
            fitted = options["method"] == "shared" or options.get("refit")
            text = {"calibration": calibration, "calibration_tokens": calibration_tokens_, "device": device}
            start = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            report = convert(
                source,
                Path(scratch) / "converted",
                overwrite=True,
                dtype="float32",
                **{**(text if fitted else {}), "sequence_length": sequence_length, **options},
            )
            result = {
                "conversion": name,
                "cache_bytes": report.kv_bytes_per_token.after,
                "seconds": round(time.perf_counter() - start, 1),
                "device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if torch.cuda.is_available()
                else None,
                "loss": losses(Path(scratch) / "converted"),
            }
            results.append(result)
            console.print_json(json.dumps(result), indent=None)
    table = Table(title=f"{source.name}: loss in nats on {tokens:,} tokens, no training", title_justify="left")
    for column in (
        "conversion",
        "cache, bytes per token",
        *(Path(v).name.split(".")[0] for v in validation),
        "gap closed",
    ):
        table.add_column(column, justify="left" if column == "conversion" else "right")
    worst = next((r["loss"][0] for r in results if r["conversion"] == "mean, 1 head(s)"), None)
    for result in results:
        closed = "" if worst is None else f"{(worst - result['loss'][0]) / (worst - original[0]):.1%}"
        cells = [f"{loss:.3f}" for loss in result["loss"]]
        table.add_row(result["conversion"], f"{result['cache_bytes']:,}", *cells, closed)
    console.print(table)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
