"""Time per output token of several models side by side, in one process:

    python -m mqa_hf.eval.speed CHECKPOINT --batch 4 --context 2048

compares, with weights drawn at random at the checkpoint's shape, the source's class with its own key/value heads, the
same class with one, and the class of this package with one. Decoding is timed as `generate()` runs it: one forward
pass a token over a growing cache. The models take turns, so that a machine whose speed drifts treats them alike.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mqa_hf import MQAConfig, MQAForCausalLM
from mqa_hf.cli import main as run
from mqa_hf.conversion import ConversionError
from mqa_hf.conversion.converter import DTYPES
from mqa_hf.conversion.families import canonical_config, family_of
from mqa_hf.conversion.source import open_source


def make_step(model: PreTrainedModel, batch: int, context: int) -> Callable[[], None]:
    """Fill a cache with `context` random tokens for `batch` rows; returns one greedy decoding step."""
    token = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    with torch.no_grad():
        output = model(token, use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal output
        with torch.no_grad():
            next_token = output.logits[:, -1:].argmax(-1)
            output = model(next_token, past_key_values=output.past_key_values, use_cache=True)

    return step


def time_per_token(
    models: dict[str, PreTrainedModel], batch: int, context: int, steps: int = 24, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each of `steps` decoding steps, per model, the models taking turns step by step.

    Args:
        models: by the name to report.
        batch: rows decoded at once.
        context: tokens in the cache when timing starts.
        steps: timed steps of each model.
        warmup: steps before them.
    """
    decoders = {name: make_step(model, batch, context) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(warmup + steps):
        for name, step in decoders.items():
            start = time.perf_counter()
            step()
            if models[name].device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def contenders(checkpoint: Path, dtype: torch.dtype, device: str) -> dict[str, PreTrainedModel]:
    """Models of random weights: the source's class as it is, with one K/V head, and ours with one."""
    source = open_source(checkpoint, weights=False)
    canonical = canonical_config(source.config, source.raw)
    ours = MQAConfig(**{**canonical.to_dict(), "num_key_value_heads": 1})
    heads, kv_heads = canonical.num_attention_heads, canonical.num_key_value_heads
    configs = {f"{_name(source.config)}, {heads} query and {kv_heads} K/V heads": source.config}
    native = family_of(source.config.model_type).native
    with suppress(ConversionError):  # the class has no place for this model with one head
        if native is not None:
            pooled = native(source.config, ours)
            configs[f"{_name(pooled)}, 1 K/V head"] = pooled
    with torch.device(device):
        models = {name: AutoModelForCausalLM.from_config(c, dtype=dtype).eval() for name, c in configs.items()}
        return {**models, "mqa-hf, 1 K/V head": MQAForCausalLM._from_config(ours, dtype=dtype).eval()}


def _name(config: PreTrainedConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Directory with the config.json of the shape.")],
    batch: Annotated[int, typer.Option(help="Rows decoded at once.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 2048,
    steps: Annotated[int, typer.Option(help="Timed steps of each model.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="A PyTorch device.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Time decoding of a shape with its own K/V heads, with one in the source's class, and with one in ours."""
    if dtype not in DTYPES:
        raise ConversionError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    seconds = time_per_token(contenders(checkpoint, DTYPES[dtype], device), batch, context, steps)
    fastest = min(statistics.median(times) for times in seconds.values())
    table = Table(title=f"decoding, {dtype}, batch {batch}, context {context}, {device}", title_justify="left")
    for column in ("model", "ms/token, median", "fastest", "slowest", "relative to the fastest"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, times in seconds.items():
        milliseconds = [1000 * t for t in times]
        median = statistics.median(milliseconds)
        table.add_row(
            name,
            *(f"{x:.1f}" for x in (median, min(milliseconds), max(milliseconds))),
            f"{median / 1000 / fastest:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    run(lambda: typer.run(main))
