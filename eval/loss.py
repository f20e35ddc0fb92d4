"""Loss of several checkpoints on the same text, in one process:

    python -m mqa_hf.eval.loss ORIGINAL CONVERTED ... --text validation.jsonl --tokens 16384

prints the mean cross-entropy in nats a token of each, and the cache that each needs. The tokenizer is the first one's.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from mqa_hf.cli import main as run
from mqa_hf.conversion.text import calibration_tokens


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, batch: int = 4) -> float:
    """Mean cross-entropy in nats of each token after the first of its row; tokens [N, T]."""
    total = 0.0
    for rows in tokens.split(batch):
        logits = model(rows.to(model.device), use_cache=False).logits[:, :-1].float()
        labels = rows[:, 1:].to(model.device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of cache that a token takes in the model's dtype, measured on a live cache."""
    with torch.no_grad():
        cache = model(torch.zeros(1, 4, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 4


app = typer.Typer(add_completion=False)


@app.command()
def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Directories to compare.")],
    text: Annotated[str | None, typer.Option(help="As --calibration of mqa-hf convert.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it.")] = 16_384,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    device: Annotated[str, typer.Option(help="A PyTorch device.")] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[Path | None, typer.Option(help="File that gets the numbers as JSON.")] = None,
) -> None:
    """Mean loss of checkpoints on a text."""
    table = Table(
        title=f"{text or 'Python manual'}, {tokens} tokens in rows of {sequence_length}", title_justify="left"
    )
    for column in ("checkpoint", "loss, nats", "cache, bytes per token"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    ids, found = None, []
    for checkpoint in checkpoints:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().to(device)
        if ids is None:
            ids = calibration_tokens(checkpoint, text, tokens, sequence_length, model.config.vocab_size, seed=0)
        bytes_at_16_bits = cache_bytes(model) // 2
        loss = mean_loss(model, ids)
        found.append({"checkpoint": str(checkpoint), "loss": loss, "kv_bytes_per_token": bytes_at_16_bits})
        table.add_row(checkpoint.name, f"{loss:.3f}", f"{bytes_at_16_bits:,} (16 bit)")
    Console(width=120, markup=False).print(table)
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run(app)
